// The selective scan as an operator of onnxruntime: mmvssm::SelectiveScan, version 1, forward only.
//
// Inputs, in this order, those in brackets optional:
//
//     u, delta (B, L, K, D), A (K, D, N), B, C (B, L, K, N), [D, delta_bias (K, D)],
//     [order, source, gap (K, L) or (B, K, L), int64], [rest (K, D)]
//
// and the attribute delta_softplus, 0 or 1; output y (B, L, K, D). All but the indices are float32, and where the walks
// share one it may have size 1 along K. For the meaning see naive.py.
//
// Tasks run on the session's own threads, so that its intra_op_num_threads holds, sessions side by side do not take
// more than they were given, and OpenMP's threads and onnxruntime's do not wait for the same cores. onnxruntime does not
// say how many it has: the work is divided for all processors, which is fine for fewer, since whoever is done takes the
// next task.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/onnxruntime_api.h"
#include "scan.h"

namespace {

using Shape = std::vector<int64_t>;

enum Input : int { kU, kDelta, kA, kB, kC, kD, kDeltaBias, kOrder, kSource, kGap, kRest, kInputs };
constexpr const char* kNames[kInputs] = {"u",          "delta", "A",      "B",   "C",   "D",
                                         "delta_bias", "order", "source", "gap", "rest"};
constexpr size_t kRanks[kInputs] = {4, 4, 3, 4, 4, 2, 2, 3, 3, 3, 2};  // 3 or, without images, 2 for an index
constexpr int64_t kMostStates = 1 << 20;  // the kernel counts them, times the steps of a tile, in an int

bool is_index(int input) { return input == kOrder || input == kSource || input == kGap; }

// An error that onnxruntime made.
struct Failed {
  ort::Status* status;
};

void check(ort::Status* status) {
  if (status) throw Failed{status};
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument("SelectiveScan: " + message); }

// What `function` throws becomes a status: no exception may reach onnxruntime.
template <class Create, class Function>
ort::Status* status_of(Create create_status, const Function& function) noexcept {
  try {
    function();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::invalid_argument& error) {
    return create_status(ort::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return create_status(ort::kFail, error.what());
  }
}

std::string text(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

// ---------------------------------------------------------------------------------------------------------------------
// One run of a node
// ---------------------------------------------------------------------------------------------------------------------

struct Array {
  bool given = false;
  const void* data = nullptr;
  Shape shape;
};

class Run {
 public:
  Run(const ort::Functions& ort, ort::KernelContext* context) : ort_(ort), context_(context) {
    size_t count;
    check(ort.get_input_count(context, &count));
    for (size_t i = 0; i < std::min<size_t>(count, kInputs); ++i) inputs_[i] = read(i);
    check_shapes();
  }

  void compute(bool softplus) {
    const Shape shape = {scan_.batch, scan_.length, scan_.walks, scan_.channels};
    scan_.softplus = softplus;
    scan_.threads = std::max(1u, std::thread::hardware_concurrency());
    scan_.u = rows(kU), scan_.delta = rows(kDelta), scan_.B = rows(kB), scan_.C = rows(kC);
    scan_.order = index(kOrder, order_), scan_.source = index(kSource, source_), scan_.gap = index(kGap, gap_);
    scan_.A = parameter(kA, A_), scan_.D = parameter(kD, D_);
    scan_.delta_bias = parameter(kDeltaBias, delta_bias_), scan_.rest = parameter(kRest, rest_);
    scan_.shared = walks_share();
    scan_.pool = {run_on_threads, this};
    ort::Value* y;
    check(ort_.get_output(context_, 0, shape.data(), shape.size(), &y));
    check(ort_.get_data(y, &scan_.y));
    if (const int status = scan_forward(&scan_)) {
      if (status == kOutOfMemory) throw std::runtime_error("SelectiveScan: out of memory.");
      const std::string name = status < kInSource ? "order" : "source";
      refuse(status % kInSource == kOutOfRange ? "an index in " + name + " is not a token."
                                               : name + " must visit every token exactly once in each walk.");
    }
  }

 private:
  Array read(size_t i) const {
    Array array;
    const ort::Value* value;
    check(ort_.get_input(context_, i, &value));
    if (!value) return array;
    array.given = true;
    ort::TensorInfo* info;
    check(ort_.get_tensor_info(value, &info));
    size_t dimensions = 0;
    ort::Status* status = ort_.get_dimensions_count(info, &dimensions);
    array.shape.resize(dimensions);
    if (!status) status = ort_.get_dimensions(info, array.shape.data(), dimensions);
    ort_.release_tensor_info(info);
    check(status);
    void* data;
    check(ort_.get_data(const_cast<ort::Value*>(value), &data));  // there is no other way to read in all versions
    array.data = data;
    return array;
  }

  // The kernel trusts what it is told, so nothing here may be left out.
  void check_shapes() {
    const Shape &u = inputs_[kU].shape, &A = inputs_[kA].shape;
    if (u.size() != 4) refuse("u must have shape (B, L, K, D), batch, token, walk, channel; got " + text(u) + ".");
    if (A.size() != 3) refuse("A must have shape (K, D, N), walk, channel, state; got " + text(A) + ".");
    scan_.batch = u[0], scan_.length = u[1], scan_.walks = 1, scan_.channels = u[3], scan_.states = A[2];
    for (int i = 0; i < kInputs && scan_.walks == 1; ++i) {  // the first that they do not share says how many they are
      const Shape& shape = inputs_[i].shape;
      const size_t rank = shape.size();
      if (rank == kRanks[i]) scan_.walks = shape[rank == 4 ? 2 : is_index(i) ? 1 : 0];
      if (rank == 2 && is_index(i)) scan_.walks = shape[0];
    }
    const int64_t batch = scan_.batch, length = scan_.length, walks = scan_.walks, channels = scan_.channels,
                  states = scan_.states;
    const std::string beside = " to go with u of shape " + text(u) + " and A of shape " + text(A) + "; got ";
    if (std::min({batch, length, walks, channels, states}) < 1)
      refuse("every dimension must be at least 1; got u " + text(u) + " and A " + text(A) + ".");
    if (length > INT32_MAX || states > kMostStates)
      refuse("more than 2,147,483,647 tokens or 1,048,576 states; got u " + text(u) + " and A " + text(A) + ".");
    const Shape expected[kInputs] = {
        {batch, length, walks, channels}, {batch, length, walks, channels}, {walks, channels, states},
        {batch, length, walks, states},   {batch, length, walks, states},   {walks, channels},
        {walks, channels},                {batch, walks, length},           {batch, walks, length},
        {batch, walks, length},           {walks, channels}};
    for (int i = 0; i < kInputs; ++i) {
      Shape shape = expected[i], shared = shape;
      if (!inputs_[i].given) continue;
      is_index(i) ? (void)shared.erase(shared.begin()) : (void)(shared[shape.size() == 4 ? 2 : 0] = 1);
      if (inputs_[i].shape == shape || inputs_[i].shape == shared) continue;
      refuse(kNames[i] + (" must have shape " + text(shape)) + " or " + text(shared) + beside + text(inputs_[i].shape) +
             ".");
    }
    if (inputs_[kGap].given && !inputs_[kRest].given) refuse("gap needs rest, the step size at absent positions.");
  }

  Scan::Tensor rows(Input i) const {
    const Shape& shape = inputs_[i].shape;
    const int64_t row = shape[3], token = shape[2] * row;
    return {const_cast<void*>(inputs_[i].data), shape[1] * token, token, shape[2] == 1 ? 0 : row};
  }

  // Each walk's own, whether they share it or not.
  const float* parameter(Input i, std::vector<float>& own) const {
    const Array& array = inputs_[i];
    const float* data = (const float*)array.data;
    if (!array.given || array.shape[0] == scan_.walks) return data;
    const int64_t size = scan_.channels * (i == kA ? scan_.states : 1);
    for (int64_t k = 0; k < scan_.walks; ++k) own.insert(own.end(), data, data + size);
    return own.data();
  }

  // In the kernel's 32 bits, once none is seen to be beyond what it may be.
  Scan::Index index(Input i, std::vector<int32_t>& narrow) const {
    const Array& array = inputs_[i];
    if (!array.given) return {};
    const int64_t* data = (const int64_t*)array.data;
    const bool per_image = array.shape.size() == 3;
    const int64_t walks = scan_.walks * scan_.length, count = per_image ? scan_.batch * walks : walks;
    const int64_t low = i == kGap ? INT32_MIN : 0, high = i == kGap ? INT32_MAX : scan_.length - 1;
    bool in_range = true;
    narrow.resize(count);
    for (int64_t j = 0; j < count; ++j) {
      in_range &= data[j] >= low && data[j] <= high;
      narrow[j] = (int32_t)data[j];
    }
    if (!in_range && i == kGap) refuse("a number in gap does not fit in 32 bits.");
    if (!in_range)
      refuse(std::string("an index in ") + kNames[i] + " is not a token: it must lie in [0, " +
             std::to_string(scan_.length) + ").");
    return {narrow.data(), per_image ? walks : 0, scan_.length};
  }

  // Whether the walks share all but B, order and gap.
  bool walks_share() const {
    for (const Input i : {kU, kDelta, kC})
      if (inputs_[i].shape[2] != 1) return false;
    for (const Input i : {kA, kD, kDeltaBias, kRest})
      if (inputs_[i].given && inputs_[i].shape[0] != 1) return false;
    const Scan::Index& source = scan_.source.data ? scan_.source : scan_.order;
    for (int64_t b = 0; source.data && b < (source.batch_stride ? scan_.batch : 1); ++b)
      for (int64_t k = 1; k < scan_.walks; ++k)
        if (std::memcmp(source.walk(b, k), source.walk(b, 0), scan_.length * sizeof(int32_t))) return false;
    return true;
  }

  static void run_on_threads(void* run, int64_t count, void (*function)(void*, int64_t), void* argument) {
    struct Call {
      void (*function)(void*, int64_t);
      void* argument;
    } call{function, argument};
    const auto call_one = [](void* call, size_t i) { ((Call*)call)->function(((Call*)call)->argument, (int64_t)i); };
    const Run& self = *(const Run*)run;
    check(self.ort_.parallel_for(self.context_, call_one, (size_t)count, 0, &call));
  }

  const ort::Functions& ort_;
  ort::KernelContext* context_;
  Array inputs_[kInputs];
  Scan scan_ = {};
  std::vector<int32_t> order_, source_, gap_;
  std::vector<float> A_, D_, delta_bias_, rest_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The operator
// ---------------------------------------------------------------------------------------------------------------------

// What a node needs from one run to the next.
struct Node {
  ort::Functions ort;
  bool softplus;
};

ort::Status* create(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
  const ort::Functions ort(api);
  return status_of(ort.create_status, [&] {
    int64_t softplus = -1;
    if (ort::Status* status = ort.get_attribute_int64(info, "delta_softplus", &softplus)) ort.release_status(status);
    if (softplus != 0 && softplus != 1) refuse("the attribute delta_softplus must be there and be 0 or 1.");
    *kernel = new Node{ort, softplus == 1};
  });
}

ort::Status* compute(void* kernel, ort::KernelContext* context) {
  const Node& node = *(const Node*)kernel;
  return status_of(node.ort.create_status, [&] { Run(node.ort, context).compute(node.softplus); });
}

ort::CustomOp describe() {
  using Op = const ort::CustomOp*;
  const auto zero = [](Op) { return 0; };
  ort::CustomOp op = {};
  op.version = ort::kApiVersion;
  op.name = [](Op) { return "SelectiveScan"; };
  op.execution_provider = [](Op) -> const char* { return nullptr; };
  op.input_type = [](Op, size_t i) { return is_index((int)i) ? ort::kInt64 : ort::kFloat; };
  op.input_count = [](Op) -> size_t { return kInputs; };
  op.output_type = [](Op, size_t) { return ort::kFloat; };
  op.output_count = [](Op) -> size_t { return 1; };
  op.destroy_kernel = [](void* kernel) { delete (Node*)kernel; };
  op.input_characteristic = [](Op, size_t i) { return i < kD ? ort::kRequired : ort::kOptional; };
  op.output_characteristic = [](Op, size_t) { return ort::kRequired; };
  op.input_memory_type = [](Op, size_t) { return ort::kDefault; };
  op.variadic_input_least = zero, op.variadic_input_is_homogeneous = zero;
  op.variadic_output_least = zero, op.variadic_output_is_homogeneous = zero;
  op.create_kernel_v2 = create;
  op.compute_v2 = compute;
  op.first_version = [](Op) { return 1; };
  op.last_version = [](Op) { return 1; };
  return op;
}

const ort::CustomOp kSelectiveScan = describe();

// The domain, made once for each onnxruntime in the process. Sessions refer to it as long as they live, so it stays.
ort::CustomOpDomain* domain_of(const ort::Api* api, const ort::Functions& ort) {
  static std::mutex mutex;
  static std::map<const ort::Api*, ort::CustomOpDomain*> domains;
  const std::lock_guard<std::mutex> lock(mutex);
  ort::CustomOpDomain*& domain = domains[api];
  if (!domain) {
    ort::CustomOpDomain* made;
    check(ort.create_custom_op_domain("mmvssm", &made));
    check(ort.custom_op_domain_add(made, &kSelectiveScan));
    domain = made;
  }
  return domain;
}

}  // namespace

// What onnxruntime looks for in a library of operators.
extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const ort::Api* api = base->get_api(ort::kApiVersion);
  if (!api) {
    ort::Status* (*create_status)(ort::ErrorCode, const char*);
    ort::take(base->get_api(1), 0, create_status);
    return status_of(create_status, [&] {
      refuse("onnxruntime is too old, it must be 1.17 or later; this one is " + std::string(base->get_version()) + ".");
    });
  }
  const ort::Functions ort(api);
  return status_of(ort.create_status, [&] { check(ort.add_custom_op_domain(options, domain_of(api, ort))); });
}
