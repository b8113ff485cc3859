// Looks rows up in an embedding service, with the .proto file alone: no generated code, nothing of the service's.
//
//     npm ci --ignore-scripts
//     node client.js HOST:PORT MODEL TABLE ID [ID ...]
//
// Any shard's address will do. Each step prints one line of JSON. Of a secured service, EMBEDDING_SERVICE_TLS names the
// authority's file, such as DIR/client/ca.crt, and EMBEDDING_SERVICE_TOKEN is a token.
'use strict';

const fs = require('node:fs');
const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const PROTOS = path.join(__dirname, '..', '..', 'protos');
const DEADLINE_MS = 10_000;

const definition = protoLoader.loadSync('embedding/v1/embedding.proto', {
  includeDirs: [PROTOS],
  keepCase: true,
  longs: Number, // row counts stay far below 2^53
  enums: String,
  defaults: true,
});
const { EmbeddingService } = grpc.loadPackageDefinition(definition).embedding.v1;

/** TLS with the authority in this file, and with a token if there is one. Plain text without a file. */
function credentialsOf(authority, token) {
  if (!authority) return grpc.credentials.createInsecure();
  const tls = grpc.credentials.createSsl(fs.readFileSync(authority));
  if (!token) return tls;
  const shown = new grpc.Metadata();
  shown.set('authorization', `Bearer ${token}`);
  return grpc.credentials.combineChannelCredentials(
    tls,
    grpc.credentials.createFromMetadataGenerator((_, callback) => callback(null, shown)),
  );
}

/** A client of the service; its answers are promises. */
class Embeddings {
  constructor(address, credentials = grpc.credentials.createInsecure()) {
    // Rows of many ids are more than the 4 MiB that grpc-js takes by default. The service has a limit of its own.
    // The service is reached directly, and not through http_proxy.
    const options = { 'grpc.max_receive_message_length': -1, 'grpc.enable_http_proxy': 0 };
    this.stub = new EmbeddingService(address, credentials, options);
  }

  close() {
    this.stub.close();
  }

  /** A unary call. Rejects with grpc's ServiceError: `code` is a grpc.status, `details` the service's message. */
  call(method, request) {
    return new Promise((resolve, reject) => {
      const deadline = Date.now() + DEADLINE_MS;
      this.stub[method](request, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer)));
    });
  }

  /** What is served: [{ name, version, family, tables: [{ name, rows, dim, dtype }] }]. */
  async models() {
    return (await this.call('ListModels', {})).models;
  }

  /** Rows of one table as a Float32Array each, in the order of the ids. */
  async lookup(model, table, ids) {
    const answer = await this.call('Lookup', { model, table, ids_uint32: littleEndian32(ids) });
    return rowsOf(answer);
  }

  /** The n-gram rows of each token of one sequence; the service hashes. A token has tables * heads of them. */
  async ngrams(model, tokens) {
    const answer = await this.call('LookupNgrams', { model, token_ids: tokens });
    return chunks(rowsOf(answer), answer.tables * answer.heads);
  }

  /** Many lookups on one stream, as a decode loop does; resolves when all are answered, whatever their order. */
  lookupMany(requests) {
    return new Promise((resolve, reject) => {
      const stream = this.stub.StreamLookup({ deadline: Date.now() + DEADLINE_MS });
      const results = new Array(requests.length);
      stream.on('error', reject);
      stream.on('end', () => resolve(results));
      stream.on('data', ({ request_id: id, rows, error }) => {
        // The answer to a bad request is an error. The stream and the other requests go on.
        results[id] = error ? { code: error.code, message: error.message } : rowsOf(rows);
      });
      requests.forEach(({ model, table, ids }, id) => {
        stream.write({ request_id: id, lookup: { model, table, ids_uint32: littleEndian32(ids) } });
      });
      stream.end();
    });
  }
}

/** Ids as the bytes the service reads fastest; tables of more than 2^32 rows take `ids_int64` instead. */
function littleEndian32(ids) {
  const bytes = Buffer.alloc(4 * ids.length);
  ids.forEach((id, index) => bytes.writeUInt32LE(id, 4 * index));
  return bytes;
}

/** The rows of an answer: little-endian float32, row-major. */
function rowsOf({ rows, dim }) {
  const values = Float32Array.from({ length: rows.length / 4 }, (_, index) => rows.readFloatLE(4 * index));
  return chunks(values, dim);
}

/** An array or typed array in pieces of `size`. */
function chunks(values, size) {
  return Array.from({ length: values.length / size }, (_, index) => values.slice(index * size, (index + 1) * size));
}

async function main(address, model, table, ids) {
  const { EMBEDDING_SERVICE_TLS: authority, EMBEDDING_SERVICE_TOKEN: token } = process.env;
  const embeddings = new Embeddings(address, credentialsOf(authority, token));
  const show = (step, result) =>
    console.log(JSON.stringify({ step, result }, (_, value) => (value instanceof Float32Array ? [...value] : value)));
  try {
    const served = await embeddings.models();
    show('models', served.map(({ name, version, family }) => `${name}@${version} ${family}`));
    show('lookup', await embeddings.lookup(model, table, ids));
    if (served.some(({ name, family }) => name === model && family)) {
      show('ngrams', await embeddings.ngrams(model, ids));
    }
    const single = ids.map((id) => ({ model, table, ids: [id] }));
    show('stream', await embeddings.lookupMany([...single, { model, table, ids: [2 ** 32 - 1] }]));
    show('error', await embeddings.lookup(model, 'no-such-table', ids));
  } catch (error) {
    if (error.code === undefined) throw error;
    show('error', { code: grpc.status[error.code], message: error.details });
  } finally {
    embeddings.close();
  }
}

if (require.main === module) {
  const [address, model, table, ...ids] = process.argv.slice(2);
  if (!ids.length || ids.some((id) => !/^\d+$/.test(id) || Number(id) >= 2 ** 32)) {
    console.error('usage: node client.js HOST:PORT MODEL TABLE ID [ID ...]   (ids from 0 to 2^32 - 1)');
    process.exitCode = 2;
  } else {
    main(address, model, table, ids.map(Number));
  }
}

module.exports = { Embeddings, credentialsOf };
