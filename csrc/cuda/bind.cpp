// peftkern._cuda: a stream, addresses and sizes in; no torch. Every entry checks its sizes and
// raises ValueError (std::invalid_argument); a launch that CUDA refuses raises RuntimeError.
// Launches are asynchronous: the caller has made the stream's device current.
//
// With PEFTKERN_CUDA_EMULATED the module is _cuda_emulated, for tests: addresses are a CPU's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#ifndef PEFTKERN_CUDA_EMULATED
#include <cuda_runtime_api.h>
#endif

#include "peftkern/binding.h"
#include "peftkern/cuda_low_rank_svd.h"
#include "peftkern/cuda_nf4.h"
#include "peftkern/cuda_nf4_lora_linear.h"
#include "peftkern/cuda_nf4_lora_linear_sm90a.h"

namespace py = pybind11;

namespace {

using namespace peftkern;

void check(int error) {
  if (error == cudaSuccess) return;
  const char* text = cudaGetErrorString(static_cast<cudaError_t>(error));
  cudaGetLastError();  // or torch would meet it again
  throw std::runtime_error("CUDA error " + std::to_string(error) + ": " + text);
}

// (lora_A, its dtype, lora_B, its dtype, s, r); r = 0: no adapters.
void set_lora(CudaNF4LinearArgs& args, const py::tuple& lora) {
  Fields fields(lora, "lora", 6);
  args.lora_A = fields.address<const void>();
  args.a_dtype = fields.dtype();
  args.lora_B = fields.address<const void>();
  args.b_dtype = fields.dtype();
  args.s = fields.address<float>();
  args.r = fields.size();
}

template <int (*kForward)(const CudaNF4LinearArgs&, CudaStream)>
void linear_forward(uintptr_t stream, const py::tuple& w, int64_t M, int64_t N, int64_t K,
                    uintptr_t x, int dtype, uintptr_t y, uintptr_t bias, const py::tuple& lora,
                    double scaling, uintptr_t workspace, int64_t workspace_bytes, int64_t splits) {
  CudaNF4LinearArgs args;
  args.w = view_of(w);
  args.M = M, args.N = N, args.K = K;
  args.x = pointer<const void>(x);
  args.dtype = dtype_from_code(dtype);
  args.y = pointer<void>(y);
  args.bias = pointer<const void>(bias);
  set_lora(args, lora);
  args.scaling = static_cast<float>(scaling);
  args.workspace = pointer<void>(workspace);
  args.workspace_bytes = workspace_bytes;
  args.splits = splits;
  py::gil_scoped_release release;
  check(kForward(args, pointer<CUstream_st>(stream)));
}

#ifdef PEFTKERN_CUDA_EMULATED
constexpr bool kEmulated = true;
int device_count() { return 0; }
int runtime_version() { return 0; }
int driver_version() { return 0; }
#else
constexpr bool kEmulated = false;

// 0 where there is no GPU, no driver, or an older one than this runtime needs.
int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version));
  return version;
}

// 0 without a driver.
int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version));
  return version;
}
#endif

std::vector<std::string> architectures() {
  std::istringstream words(PEFTKERN_CUDA_ARCHITECTURES);
  std::vector<std::string> names;
  for (std::string name; words >> name;) names.push_back(name);
  return names;
}

void bind(py::module_& m) {
  m.doc() = "CUDA kernels of peftkern; call them through peftkern.native_cuda.";
  m.attr("emulated") = kEmulated;
  m.def("architectures", &architectures,
        "What is compiled in: sm_80 is real code, compute_120 is PTX.");
  m.def("device_count", &device_count, "GPUs that can be used; 0 where nothing is installed.");
  m.def("runtime_version", &runtime_version, "Of CUDA, 13000 is 13.0.");
  m.def("driver_version", &driver_version, "The newest CUDA that the driver knows; 0 without one.");

  m.def("nf4_quantize",
        [](uintptr_t stream, uintptr_t src, int src_dtype, int64_t numel, int64_t blocksize,
           uintptr_t packed, int64_t packed_bytes, uintptr_t absmax, int64_t absmax_len) {
          const DType dtype = dtype_from_code(src_dtype);
          py::gil_scoped_release release;
          check(cuda_nf4_quantize(pointer<const void>(src), dtype, numel, blocksize,
                                  pointer<uint8_t>(packed), packed_bytes, pointer<float>(absmax),
                                  absmax_len, pointer<CUstream_st>(stream)));
        });
  m.def("nf4_dequantize",
        [](uintptr_t stream, const py::tuple& w, uintptr_t out, int out_dtype, int64_t out_numel) {
          const NF4View view = view_of(w);
          const DType dtype = dtype_from_code(out_dtype);
          py::gil_scoped_release release;
          check(cuda_nf4_dequantize(view, pointer<void>(out), dtype, out_numel,
                                    pointer<CUstream_st>(stream)));
        });

  m.def("jacobi_workspace", &cuda_jacobi_workspace,
        "Doubles that a matrix needs on the current device: (r, vectors, shared_limit).");
  m.def("jacobi_svd", [](uintptr_t stream, int64_t count, int64_t r, int sweeps, uintptr_t cores,
                         uintptr_t sigma, uintptr_t left, uintptr_t right, uintptr_t info,
                         uintptr_t workspace, int64_t workspace_len, int64_t shared_limit) {
    CudaJacobiSvdArgs args;
    args.cores = pointer<const double>(cores);
    args.count = count;
    args.r = r;
    args.sweeps = sweeps;
    args.sigma = pointer<double>(sigma);
    args.left = pointer<double>(left);
    args.right = pointer<double>(right);
    args.info = pointer<int64_t>(info);
    args.workspace = pointer<double>(workspace);
    args.workspace_len = workspace_len;
    args.shared_limit = shared_limit;
    py::gil_scoped_release release;
    check(cuda_jacobi_svd(args, pointer<CUstream_st>(stream)));
  });
  m.def("gram_roots", [](uintptr_t stream, int64_t count, int64_t r, uintptr_t grams,
                         uintptr_t roots, uintptr_t inverses, uintptr_t norms, uintptr_t workspace,
                         int64_t workspace_len, int64_t shared_limit) {
    CudaGramRootsArgs args;
    args.grams = pointer<const double>(grams);
    args.count = count;
    args.r = r;
    args.roots = pointer<double>(roots);
    args.inverses = pointer<double>(inverses);
    args.norms = pointer<double>(norms);
    args.workspace = pointer<double>(workspace);
    args.workspace_len = workspace_len;
    args.shared_limit = shared_limit;
    py::gil_scoped_release release;
    check(cuda_gram_roots(args, pointer<CUstream_st>(stream)));
  });
  m.attr("JACOBI_RANK") = kCudaJacobiRank;
  m.attr("LINEAR_ROWS") = kCudaLinearRows;
  m.attr("LINEAR_RANK") = kCudaLinearRank;
  m.attr("LINEAR_BLOCK") = kCudaLinearBlock;
  m.attr("LINEAR_SIZE") = kCudaLinearSize;
  m.attr("PREFILL_ROWS") = kCudaPrefillRows;
  m.attr("PREFILL_RANK") = kCudaPrefillRank;
  m.attr("PREFILL_UNIT") = kCudaPrefillUnit;
  m.def("nf4_lora_linear_workspace", &cuda_nf4_lora_linear_workspace,
        "Bytes that nf4_lora_linear_forward needs for M, N, K, splits on the current device.");
  m.def("nf4_lora_linear_forward", &linear_forward<cuda_nf4_lora_linear_forward>);
#if PEFTKERN_CUDA_SM90A || defined(PEFTKERN_CUDA_EMULATED)
  m.def("nf4_lora_linear_sm90a_workspace", &cuda_nf4_lora_linear_sm90a_workspace,
        "The same for nf4_lora_linear_sm90a_forward and M, N, K, r, splits.");
  m.def("nf4_lora_linear_sm90a_forward", &linear_forward<cuda_nf4_lora_linear_sm90a_forward>);
#endif
}

}  // namespace

#ifdef PEFTKERN_CUDA_EMULATED
PYBIND11_MODULE(_cuda_emulated, m) {
  bind(m);
  m.def("set_schedule", &emulation::set_schedule,
        "The order in which threads take their turns, on this thread; see cuda_emulation.h.");
}
#else
PYBIND11_MODULE(_cuda, m) { bind(m); }
#endif
