// Looks rows up in an embedding service as an inference engine would: with gRPC and the stubs of the .proto alone.
//
//     make
//     build/client HOST:PORT MODEL TABLE ID [ID ...]
//
// Any shard's address will do. Prints the ids' rows from one call, then again from a stream, an id a step. Of a secured
// service, EMBEDDING_SERVICE_TLS names the authority's file, such as DIR/client/ca.crt, and EMBEDDING_SERVICE_TOKEN is
// a token.
#include <absl/status/status.h>
#include <grpcpp/grpcpp.h>

#include <bit>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "embedding/v1/embedding.grpc.pb.h"

namespace pb = embedding::v1;

static_assert(std::endian::native == std::endian::little, "ids and rows cross as little-endian bytes");

constexpr std::chrono::seconds kDeadline{10};

/** What the service, or gRPC on the way to it, answers instead of rows. */
class LookupError : public std::runtime_error {
 public:
  LookupError(int code, const std::string& message)
      // Abseil's status codes are gRPC's, and have names.
      : std::runtime_error(absl::StatusCodeToString(static_cast<absl::StatusCode>(code)) + ": " + message) {}
};

void ThrowUnlessOk(const grpc::Status& status) {
  if (!status.ok()) throw LookupError(status.error_code(), status.error_message());
}

/** Row-major [ids, dim], in the order of the ids. */
struct Rows {
  std::vector<float> values;
  size_t dim;
};

pb::LookupRequest RequestFor(const std::string& model, const std::string& table, const std::vector<int64_t>& ids) {
  pb::LookupRequest request;
  request.set_model(model);
  request.set_table(table);
  request.set_ids_int64(ids.data(), ids.size() * sizeof(int64_t));
  return request;
}

Rows RowsOf(const pb::LookupResponse& answer) {
  Rows rows{std::vector<float>(answer.rows().size() / sizeof(float)), answer.dim()};
  std::memcpy(rows.values.data(), answer.rows().data(), answer.rows().size());
  return rows;
}

/** One call; throws LookupError. */
Rows Lookup(pb::EmbeddingService::Stub& stub, const pb::LookupRequest& request) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kDeadline);
  pb::LookupResponse answer;
  ThrowUnlessOk(stub.Lookup(&context, request, &answer));
  return RowsOf(answer);
}

/** A decode loop's lookups: one stream for all its steps, which costs less than a call a step. Not thread-safe. */
class LookupStream {
 public:
  /** The stream ends `lifetime` from now at the latest. */
  LookupStream(pb::EmbeddingService::Stub& stub, std::chrono::seconds lifetime) {
    context_.set_deadline(std::chrono::system_clock::now() + lifetime);
    stream_ = stub.StreamLookup(&context_);
  }

  ~LookupStream() { context_.TryCancel(); }

  /** Throws LookupError. After a request that the service refuses the stream goes on, after any other error it is over. */
  Rows Lookup(const pb::LookupRequest& request) {
    pb::StreamLookupRequest asked;
    asked.set_request_id(++last_id_);  // for clients with several requests under way: answers come in any order
    *asked.mutable_lookup() = request;
    pb::StreamLookupResponse answer;
    if (!stream_->Write(asked) || !stream_->Read(&answer)) {
      ThrowUnlessOk(stream_->Finish());
      throw LookupError(GRPC_STATUS_UNAVAILABLE, "the service ended the stream");
    }
    if (answer.has_error()) throw LookupError(answer.error().code(), answer.error().message());
    return RowsOf(answer.rows());
  }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<pb::StreamLookupRequest, pb::StreamLookupResponse>> stream_;
  uint64_t last_id_ = 0;
};

void Print(const Rows& rows) {
  for (size_t i = 0; i < rows.values.size(); ++i) std::cout << rows.values[i] << ((i + 1) % rows.dim ? ' ' : '\n');
}

std::vector<int64_t> Numbers(char** first, char** last) {
  std::vector<int64_t> numbers;
  for (; first != last; ++first) {
    size_t read = 0;
    numbers.push_back(std::stoll(*first, &read));
    if ((*first)[read]) throw std::invalid_argument(*first);
  }
  return numbers;
}

/** TLS and a token, where the environment names them. Throws invalid_argument for a file that cannot be read. */
std::shared_ptr<grpc::ChannelCredentials> Credentials() {
  const char* authority = std::getenv("EMBEDDING_SERVICE_TLS");
  const char* token = std::getenv("EMBEDDING_SERVICE_TOKEN");
  if (!authority || !*authority) return grpc::InsecureChannelCredentials();
  std::ifstream file(authority, std::ios::binary);
  if (!file) throw std::invalid_argument(std::string("EMBEDDING_SERVICE_TLS cannot be read: ") + authority);
  grpc::SslCredentialsOptions options;
  options.pem_root_certs.assign(std::istreambuf_iterator<char>(file), {});
  auto tls = grpc::SslCredentials(options);
  if (!token || !*token) return tls;
  return grpc::CompositeChannelCredentials(tls, grpc::AccessTokenCredentials(token));
}

void Run(const std::string& address, const std::string& model, const std::string& table,
         const std::vector<int64_t>& ids) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);  // gRPC's own limit, 4 MiB, is less than many rows. The service has one too
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);  // the service is reached directly, and not through http_proxy
  auto channel = grpc::CreateCustomChannel(address, Credentials(), arguments);
  auto stub = pb::EmbeddingService::NewStub(channel);

  std::cout << std::setprecision(std::numeric_limits<float>::max_digits10) << "# one call\n";
  Print(Lookup(*stub, RequestFor(model, table, ids)));

  std::cout << "# a stream\n";
  LookupStream stream(*stub, kDeadline);
  for (int64_t id : ids) Print(stream.Lookup(RequestFor(model, table, {id})));
}

int main(int argc, char** argv) {
  std::vector<int64_t> ids;
  try {
    if (argc > 4) ids = Numbers(argv + 4, argv + argc);
  } catch (const std::logic_error&) {  // not a number, or too large a one
    ids.clear();
  }
  if (ids.empty()) {
    std::cerr << "usage: " << argv[0] << " HOST:PORT MODEL TABLE ID [ID ...]\n";
    return 2;
  }
  try {
    Run(argv[1], argv[2], argv[3], ids);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
