// Every launcher, declared once: the table of contents of csrc/.
#pragma once
#include <vector>

#include "kron.h"
#include "kron_apply.h"
#include "matrices.h"
#include "table.h"

namespace fastcurv {

// cpu/simd.cpp: which clone of the vectorised loops runs ("default", "x86-64-v3", ...).
const char* simd_level();

// cpu/<op>.cpp: the whole list in one parallel region. The table and every pointer in it are in host memory. `variant`
// is one of those that the op's rule counts up, or 0. Returns whether it wrote lists that are written on some steps
// only.
using CpuOp = bool(const Args& args, Dtype param, Dtype state, int variant);
CpuOp adam_cpu, lamb_cpu, lars_cpu, lookahead_cpu, nero_cpu, ranger_cpu, sgd_cpu;

// cpu/<op>.cpp: ops on each matrix of a list, all of one dtype, in host memory.
void polar_cpu(const std::vector<Matrix>& matrices, Dtype dtype);
void gram_schmidt_cpu(const std::vector<Matrix>& matrices, Dtype dtype, double floor);
void newton_schulz_cpu(const std::vector<Matrix>& matrices, Dtype dtype, const std::vector<Step>& steps,
                       long long spectral, double eps);

void kron_apply_cpu(const std::vector<Layer>& layers, Dtype dtype);
void kron_inverse_cpu(const std::vector<Factor>& factors, Dtype dtype);
void kron_root_cpu(const std::vector<Factor>& factors, Dtype dtype, long long p);

// `samples`: their dtype; `sums`: that of sums, at least float64 where samples are.
void kron_factor_cpu(const std::vector<Statistic>& statistics, Dtype samples, Dtype sums);

// cpu/stream.cpp: reads every list of a host table, block by block, and writes some of them back unchanged. Returns the
// exclusive or of all bytes of the lists that are only read.
struct StreamList {
  int item_size;
  bool is_written;
};
int stream_cpu(long long* table, const std::vector<StreamList>& lists, long long block_elements);

#ifdef FASTCURV_HAS_CUDA
// cuda/device.cu: a CUDA error code as text; those codes (0: none) for whether this module holds code that the device
// can run, and for the number of its multiprocessors.
const char* cuda_error_text(int error);
int cuda_has_code_for(int device);
int cuda_multiprocessors(int device, int* count);

// The kernels of an op for some dtypes and variant, in the order in which they are launched. The first two are those
// that take the sums over rows of tensors that do not do so on the way: null where the op needs none.
using CudaKernel = void (*)(Args);
struct CudaKernels {
  CudaKernel partials, rows, update;
};

// cuda/<op>.cu
using CudaOp = CudaKernels(Dtype param, Dtype state, int variant);
CudaOp adam_cuda, lamb_cuda, lars_cuda, lookahead_cuda, nero_cuda, ranger_cuda, sgd_cuda;

// Those of ops on matrices.
using CudaMatrixKernel = void (*)(MatrixArgs);
CudaMatrixKernel gram_schmidt_cuda(Dtype dtype), newton_schulz_cuda(Dtype dtype);
using CudaKronKernel = void (*)(KronArgs);
CudaKronKernel kron_inverse_cuda(Dtype dtype), kron_root_cuda(Dtype dtype);
using CudaStatisticKernel = void (*)(StatisticArgs);
// A block for each tile and part of the samples, then one for each tile.
struct CudaStatisticKernels {
  CudaStatisticKernel sums, update;
};
CudaStatisticKernels kron_factor_cuda(Dtype samples, Dtype sums);
using CudaKronApplyKernel = void (*)(KronApplyArgs);
CudaKronApplyKernel kron_apply_cuda(Dtype dtype);

// cuda/device.cu: launches one of them; returns a CUDA error code.
int cuda_launch(CudaKernel kernel, int blocks, int threads, const Args& args, int device, void* stream);
int cuda_launch(CudaMatrixKernel kernel, int blocks, int shared_bytes, const MatrixArgs& args, int device,
                void* stream);
int cuda_launch(CudaKronKernel kernel, int blocks, int shared_bytes, const KronArgs& args, int device, void* stream);
int cuda_launch(CudaStatisticKernel kernel, int blocks, const StatisticArgs& args, int device, void* stream);
int cuda_launch(CudaKronApplyKernel kernel, int blocks, const KronApplyArgs& args, int device, void* stream);
#endif

}  // namespace fastcurv
