// The part of the DLPack 1.x C exchange API (a published ABI) that fastcurv reads; field order is that of the standard.
#pragma once
#include <cstdint>

namespace fastcurv::dlpack {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
enum TypeCode : uint8_t { kFloat = 2, kBfloat = 4 };
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};
struct ExchangeApi {
  ExchangeHeader header;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*to_tensor)(void* object, Tensor* out);  // may be null
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace fastcurv::dlpack
