// SPDX-License-Identifier: Apache-2.0
// Preloaded in place of libcudart, it lets the extension's ops run on a machine
// without a GPU (held_cases.py): tensors in the host's memory count as a
// device's, and a launch is noted in place of being made.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>

namespace {

std::map<const void*, std::string> kernels;  // names, by the host's address
std::set<const void*> host;                  // data of tensors that stay there
std::string noted;
int maps = 0;

struct Dim {
  unsigned x, y, z;
};

// cudaLaunchConfig_t, as far as it is read.
struct Config {
  Dim grid, block;
};

using GetData = int32_t (*)(void*, void**);
using InitLibrary = int32_t (*)(const char*, const char*, const char*, uint32_t,
                                void**);

template <typename F>
F torch_function(const char* name) {
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  return reinterpret_cast<F>(dlsym(torch, name));
}

// Stands for cuTensorMapEncodeTiled.
int encode_map(void* map, int, unsigned, void* p, ...) {
  ++maps;
  std::memset(map, 0, 128);
  std::memcpy(map, &p, sizeof p);
  return 0;
}

}  // namespace

extern "C" {

// What held_cases.py calls.
void recorder_keep_on_host(const void* data) { host.insert(data); }
int recorder_maps() { return maps; }
const char* recorder_take() {
  static std::string taken;
  taken.swap(noted);
  noted.clear();
  return taken.c_str();
}

// PyTorch, for the extension.
int32_t aoti_torch_get_device_type(void* tensor, int32_t* type) {
  static const auto get = torch_function<GetData>("aoti_torch_get_data_ptr");
  void* data;
  get(tensor, &data);
  *type = host.count(data) != 0 ? 0 : 1;
  return 0;
}
int32_t aoti_torch_get_device_index(void*, int32_t* index) {
  *index = 0;
  return 0;
}
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
// The ops of a CUDA device become those of a CPU.
int32_t aoti_torch_library_init_impl(const char* name, const char* key,
                                     const char* file, uint32_t line,
                                     void** library) {
  static const auto init =
      torch_function<InitLibrary>("aoti_torch_library_init_impl");
  const bool ours =
      std::strcmp(name, "vllm_steering") == 0 && std::strcmp(key, "CUDA") == 0;
  return init(name, ours ? "CPU" : key, file, line, library);
}

// The CUDA runtime. What returns 0 has succeeded.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar() {}
void __cudaRegisterFunction(void**, const char* address, char*,
                            const char* name) {
  kernels[address] = name;
}
int cudaLaunchKernelExC(const Config* config, const void* kernel, void**) {
  noted += kernels[kernel] + " " + std::to_string(config->grid.x) + " " +
           std::to_string(config->block.x) + "\n";
  return 0;
}
int cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned,
                                     unsigned long long, int* status) {
  const bool encodes = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *found = encodes ? reinterpret_cast<void*>(encode_map) : nullptr;
  *status = encodes ? 0 : 1;
  return *status;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  // Multiprocessors, compute capability, shared memory of a multiprocessor.
  *value = attribute == 16   ? 132
           : attribute == 75 ? 9
           : attribute == 81 ? 228 * 1024
                             : 0;
  return 0;
}
int cudaGetDevice(int* device) { return *device = 0; }
const char* cudaGetErrorString(int) { return "an error"; }
#define SUCCEEDS(name) \
  int name() { return 0; }
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaFuncGetAttributes)
SUCCEEDS(cudaDriverGetVersion)
SUCCEEDS(cudaGraphAddNode)
SUCCEEDS(cudaGraphAddNode_v2)
SUCCEEDS(cudaGraphConditionalHandleCreate)
SUCCEEDS(cudaStreamBeginCaptureToGraph)
SUCCEEDS(cudaStreamEndCapture)
SUCCEEDS(cudaStreamGetCaptureInfo)
SUCCEEDS(cudaStreamGetCaptureInfo_v3)
SUCCEEDS(cudaStreamUpdateCaptureDependencies)
SUCCEEDS(__cudaGetKernel)
SUCCEEDS(__cudaLaunchKernel)
SUCCEEDS(__cudaPopCallConfiguration)
SUCCEEDS(__cudaPushCallConfiguration)

}  // extern "C"
