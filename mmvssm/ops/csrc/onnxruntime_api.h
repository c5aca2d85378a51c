// The part of onnxruntime's C interface that operators of ours need.
//
// That interface is a table of function pointers to which each version appends, so places in it never change: nothing of
// onnxruntime has to be there when this is compiled, and one library serves all versions from 1.17 on. Places and types
// are those of OrtApi and OrtCustomOp in onnxruntime_c_api.h.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 17;  // of onnxruntime 1.17, the first with KernelContext_ParallelFor

// Known by pointers only.
struct Api;
struct CustomOp;
struct CustomOpDomain;
struct KernelContext;
struct KernelInfo;
struct SessionOptions;
struct ShapeInferContext;
struct Status;
struct TensorInfo;
struct Value;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kInt64 = 7 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kDefault = 0 };

struct ApiBase {
  const Api* (*get_api)(uint32_t version);  // null if that version is newer than the library
  const char* (*get_version)();
};

template <class Function>
void take(const Api* api, int place, Function*& function) {
  function = reinterpret_cast<Function*>(reinterpret_cast<void* const*>(api)[place]);
}

// Those that return a status return null if they worked, else what has to be released or handed on.
struct Functions {
  Status* (*create_status)(ErrorCode, const char* message);
  Status* (*create_custom_op_domain)(const char* name, CustomOpDomain**);
  Status* (*custom_op_domain_add)(CustomOpDomain*, const CustomOp*);
  Status* (*add_custom_op_domain)(SessionOptions*, CustomOpDomain*);
  Status* (*get_data)(Value*, void**);
  Status* (*get_dimensions_count)(const TensorInfo*, size_t*);
  Status* (*get_dimensions)(const TensorInfo*, int64_t*, size_t count);
  Status* (*get_tensor_info)(const Value*, TensorInfo**);
  Status* (*get_attribute_int64)(const KernelInfo*, const char* name, int64_t*);
  Status* (*get_input_count)(const KernelContext*, size_t*);
  Status* (*get_input)(const KernelContext*, size_t index, const Value**);  // null for an optional one that is missing
  Status* (*get_output)(KernelContext*, size_t index, const int64_t* shape, size_t dimensions, Value**);
  void (*release_status)(Status*);
  void (*release_tensor_info)(TensorInfo*);
  Status* (*parallel_for)(const KernelContext*, void (*)(void* argument, size_t i), size_t count, size_t batches,
                          void* argument);

  explicit Functions(const Api* api) {  // of kApiVersion
    take(api, 0, create_status);
    take(api, 26, create_custom_op_domain);
    take(api, 27, custom_op_domain_add);
    take(api, 28, add_custom_op_domain);
    take(api, 51, get_data);
    take(api, 61, get_dimensions_count);
    take(api, 62, get_dimensions);
    take(api, 65, get_tensor_info);
    take(api, 86, get_attribute_int64);
    take(api, 88, get_input_count);
    take(api, 90, get_input);
    take(api, 91, get_output);
    take(api, 93, release_status);
    take(api, 99, release_tensor_info);
    take(api, 274, parallel_for);
  }
};

// An operator, as onnxruntime calls it. What may be null is not called, or not in kApiVersion.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);  // may be null
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);  // returns null for the CPU's
  ElementType (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  ElementType (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);  // may be null
  void (*destroy_kernel)(void* kernel);
  Characteristic (*input_characteristic)(const CustomOp*, size_t);
  Characteristic (*output_characteristic)(const CustomOp*, size_t);
  MemoryType (*input_memory_type)(const CustomOp*, size_t);
  int (*variadic_input_least)(const CustomOp*);
  int (*variadic_input_is_homogeneous)(const CustomOp*);
  int (*variadic_output_least)(const CustomOp*);
  int (*variadic_output_is_homogeneous)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_shapes)(const CustomOp*, ShapeInferContext*);  // may be null
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
};

}  // namespace ort
