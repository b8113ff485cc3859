#!/usr/bin/env bash
# The service from a shell, with grpcurl (https://github.com/fullstorydev/grpcurl) and jq: no .proto file, because every
# process tells its own by server reflection.
#
#     examples/shell/walkthrough.sh HOST:PORT MODEL TABLE ID [ID ...]
#
# Of a secured service, EMBEDDING_SERVICE_TLS names the authority's file, such as DIR/client/ca.crt, and
# EMBEDDING_SERVICE_TOKEN is a token.
set -euo pipefail
if (($# < 4)); then
    echo "usage: $0 HOST:PORT MODEL TABLE ID [ID ...]" >&2
    exit 2
fi
address=$1 model=$2 table=$3
ids=$(IFS=,; echo "${*:4}")
service=embedding.v1.EmbeddingService
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT
secured=(-plaintext)
if [[ ${EMBEDDING_SERVICE_TLS:-} ]]; then
    # grpcurl itself puts the token in, so that no list of processes shows it.
    secured=(-cacert "$EMBEDDING_SERVICE_TLS")
    [[ ${EMBEDDING_SERVICE_TOKEN:-} ]] && secured+=(-expand-headers -H 'authorization: Bearer ${EMBEDDING_SERVICE_TOKEN}')
fi
call() { grpcurl "${secured[@]}" -max-time 10 "$@"; }
ask() { call -d "$(jq -nc --arg model "$model" --arg table "$table" "$1")" "$address" "$service/$2"; }
title() { printf '\n# %s\n' "$1"; }

title "What does this process serve?"
call "$address" list

title "What can be asked of it, and what is a lookup?"
call "$address" describe $service
call "$address" describe embedding.v1.LookupRequest

title "Is it well?"
call "$address" grpc.health.v1.Health/Check

title "Which models are there?"
ask '{}' ListModels | jq -c '.models[] | {name, version, family, tables: [.tables[] | {name, rows, dim, dtype}]}'

title "Rows $ids of $model/$table: bytes are base64 in JSON, and these are little-endian float32"
ask "{model: \$model, table: \$table, ids: [$ids]}" Lookup >"$answer"
jq -r .rows "$answer" | base64 --decode | od -A n -t f4 -w"$(jq '4 * .dim' "$answer")"

title "The same on a stream; each answer bears its request's id"
ask "{request_id: 1, lookup: {model: \$model, table: \$table, ids: [$ids]}}" StreamLookup |
    jq -c '{request: (.request_id // .requestId), dim: .rows.dim}' # grpcurl's releases spell JSON's names differently

title "A wrong name is answered with the right ones"
ask "{model: \$model, table: \"no-such-table\", ids: [$ids]}" Lookup || echo "grpcurl ended with $?"
