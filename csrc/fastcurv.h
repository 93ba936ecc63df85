// Every launcher, declared once: the table of contents of csrc/.
#pragma once
#include <vector>

#include "adam_rule.h"

namespace fastcurv {

// cpu/simd.cpp: which clone of the vectorised loops runs ("default", "x86-64-v3", ...).
const char* simd_level();

// cpu/adam.cpp: the whole list in one parallel region. `table` and every pointer in it are in host memory.
void adam_cpu(const AdamArgs& args, Dtype param, Dtype state, SecondMoment rule);

// cpu/stream.cpp: reads every list of a host table, block by block, and writes some of them back unchanged. Returns the
// exclusive or of all bytes of the lists that are only read.
struct StreamList {
  int item_size;
  bool is_written;
};
int stream_cpu(const long long* table, const std::vector<StreamList>& lists, long long block_elements);

#ifdef FASTCURV_HAS_CUDA
// cuda/device.cu: a CUDA error code as text; those codes (0: none) for whether this module holds code that the device
// can run, and for the number of its multiprocessors.
const char* cuda_error_text(int error);
int cuda_has_code_for(int device);
int cuda_multiprocessors(int device, int* count);

// cuda/adam.cu: one launch on `stream`; returns a CUDA error code.
int adam_cuda(const AdamArgs& args, Dtype param, Dtype state, SecondMoment rule, int device, int blocks, void* stream);
#endif

}  // namespace fastcurv
