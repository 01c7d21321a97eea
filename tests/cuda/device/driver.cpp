// An emulated CUDA device: libcuda.so.1 as candle and cudarc use it. Device memory is host memory between guard pages
// that starts as NaN; a launch runs on the machine of ../machine. Functions that nothing here uses are left out.
//
//   EMULATED_NO_DEVICE=1     a driver that finds no card
//   EMULATED_MEMORY=BYTES    the card's memory (default: no limit)
//   EMULATED_STATISTICS=1    at exit, counts of launches and of buffers that nobody freed
#include <sys/mman.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

struct uint3 { unsigned x, y, z; };

// 0 where the kernel was found and has run.
extern "C" int cuda_cpu_launch(const char* name, uint3 grid, uint3 block, unsigned dynamic_shared, void** parameters);
extern "C" int candle_cpu_launch(const char* name, uint3 grid, uint3 block, unsigned dynamic_shared, void** parameters);

namespace {

enum Result {
  SUCCESS = 0,
  OUT_OF_MEMORY = 2,
  INVALID_DEVICE_FUNCTION = 98,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_PTX = 218,
  FILE_NOT_FOUND = 301,
  NOT_FOUND = 500,
  NOT_SUPPORTED = 801,
};
constexpr size_t PAGE = 4096;

struct Mapping { char* start; size_t bytes; size_t wanted; };
struct Module { std::string ptx; };
struct Function { std::string name; };

struct Device {
  std::recursive_mutex mutex;
  std::map<uint64_t, Mapping> live;
  std::map<std::string, size_t> launches;
  size_t used = 0;

  ~Device() {
    if (!getenv("EMULATED_STATISTICS")) return;
    size_t all = 0;
    for (auto& [name, count] : launches) all += count;
    fprintf(stderr, "emulated device: %zu launches, %zu buffers not freed\n", all, live.size());
    for (auto& [name, count] : launches) fprintf(stderr, "%8zu %s\n", count, name.c_str());
  }
} device;

using Lock = std::lock_guard<std::recursive_mutex>;

// The buffer ends at a page that may not be touched, up to the 15 bytes that alignment leaves.
int allocate(uint64_t* address, size_t bytes) {
  Lock lock(device.mutex);
  const char* limit = getenv("EMULATED_MEMORY");
  if (limit && device.used + bytes > strtoull(limit, nullptr, 10)) return OUT_OF_MEMORY;
  const size_t rounded = (bytes + 15) / 16 * 16, pages = (rounded + PAGE - 1) / PAGE * PAGE;
  void* start = mmap(nullptr, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return OUT_OF_MEMORY;
  char* usable = (char*)start + PAGE;
  mprotect(usable, pages, PROT_READ | PROT_WRITE);
  memset(usable, 0xff, pages);
  *address = (uint64_t)(usable + pages - rounded);
  device.live[*address] = {(char*)start, pages + 2 * PAGE, bytes};
  device.used += bytes;
  return SUCCESS;
}

int release(uint64_t address) {
  Lock lock(device.mutex);
  if (!address) return SUCCESS;
  auto found = device.live.find(address);
  if (found == device.live.end()) {
    fprintf(stderr, "emulated device: free of an address that was never allocated\n");
    abort();
  }
  device.used -= found->second.wanted;
  munmap(found->second.start, found->second.bytes);
  device.live.erase(found);
  return SUCCESS;
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return getenv("EMULATED_NO_DEVICE") ? NO_DEVICE : SUCCESS; }
int cuDeviceGet(int* handle, int ordinal) {
  *handle = ordinal;
  return ordinal ? INVALID_DEVICE : SUCCESS;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return SUCCESS;
}
// Compute capability 9.0, 132 multiprocessors, memory pools; 1 for whatever else is asked.
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 1;
  return SUCCESS;
}
int cuDeviceGetName(char* name, int length, int) {
  snprintf(name, (size_t)length, "emulated device");
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = (void*)16;
  return SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuCtxDestroy_v2(void*) { return SUCCESS; }
int cuCtxSetCurrent(void*) { return SUCCESS; }
int cuCtxGetCurrent(void** context) {
  *context = (void*)16;
  return SUCCESS;
}
int cuCtxSynchronize() { return SUCCESS; }

// Everything runs at once and in order, so events and streams have nothing to do.
int cuEventCreate(void** event, unsigned) {
  *event = malloc(1);
  return SUCCESS;
}
int cuEventDestroy_v2(void* event) {
  free(event);
  return SUCCESS;
}
int cuEventRecord(void*, void*) { return SUCCESS; }
int cuStreamWaitEvent(void*, void*, unsigned) { return SUCCESS; }
int cuStreamSynchronize(void*) { return SUCCESS; }
int cuStreamCreate(void** stream, unsigned) {
  *stream = (void*)32;
  return SUCCESS;
}
int cuStreamDestroy_v2(void*) { return SUCCESS; }
int cuStreamIsCapturing(void*, int* status) {
  *status = 0;
  return SUCCESS;
}
int cuStreamBeginCapture_v2(void*, int) { return NOT_SUPPORTED; }
int cuStreamEndCapture(void*, void** graph) {
  *graph = nullptr;
  return NOT_SUPPORTED;
}
int cuGraphDestroy(void*) { return SUCCESS; }
int cuGraphExecDestroy(void*) { return SUCCESS; }
int cuGraphLaunch(void*, void*) { return NOT_SUPPORTED; }
int cuGraphInstantiateWithFlags(void**, void*, unsigned long long) { return NOT_SUPPORTED; }

int cuGetErrorName(int error, const char** name) {
  *name = error == OUT_OF_MEMORY   ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == NO_DEVICE     ? "CUDA_ERROR_NO_DEVICE"
          : error == INVALID_DEVICE ? "CUDA_ERROR_INVALID_DEVICE"
                                   : "CUDA_ERROR_OF_THE_EMULATED_DEVICE";
  return SUCCESS;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == OUT_OF_MEMORY   ? "out of memory"
          : error == NO_DEVICE     ? "no CUDA-capable device is detected"
          : error == INVALID_DEVICE ? "invalid device ordinal"
                                   : "an error of the emulated device";
  return SUCCESS;
}

int cuMemAlloc_v2(uint64_t* address, size_t bytes) { return allocate(address, bytes); }
int cuMemAllocAsync(uint64_t* address, size_t bytes, void*) { return allocate(address, bytes); }
int cuMemFree_v2(uint64_t address) { return release(address); }
int cuMemFreeAsync(uint64_t address, void*) { return release(address); }
int cuMemcpyHtoDAsync_v2(uint64_t target, const void* source, size_t bytes, void*) {
  memcpy((void*)target, source, bytes);
  return SUCCESS;
}
int cuMemcpyDtoHAsync_v2(void* target, uint64_t source, size_t bytes, void*) {
  memcpy(target, (const void*)source, bytes);
  return SUCCESS;
}
int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t bytes, void*) {
  memmove((void*)target, (const void*)source, bytes);
  return SUCCESS;
}
int cuMemcpyPeerAsync(uint64_t, void*, uint64_t, void*, size_t, void*) { return NOT_SUPPORTED; }
int cuMemsetD8Async(uint64_t target, unsigned char byte, size_t bytes, void*) {
  memset((void*)target, byte, bytes);
  return SUCCESS;
}
int cuMemGetInfo_v2(size_t* available, size_t* total) {
  Lock lock(device.mutex);
  const char* limit = getenv("EMULATED_MEMORY");
  *total = limit ? strtoull(limit, nullptr, 10) : (size_t)80 << 30;
  *available = *total - device.used;
  return SUCCESS;
}

// A module is its PTX; a function must stand in it, so a wrong name is found although another text runs.
int cuModuleLoad(void**, const char*) { return FILE_NOT_FOUND; }
int cuModuleLoadData(void** module, const void* image) {
  auto* loaded = new Module{(const char*)image};
  *module = loaded;
  return loaded->ptx.find(".entry") == std::string::npos ? INVALID_PTX : SUCCESS;
}
int cuModuleUnload(void* module) {
  delete (Module*)module;
  return SUCCESS;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (((Module*)module)->ptx.find(std::string(".entry ") + name + "(") == std::string::npos) return NOT_FOUND;
  *function = new Function{name};
  return SUCCESS;
}
int cuLaunchKernel(void* opaque, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void*, void** parameters, void**) {
  Lock lock(device.mutex);
  const char* name = ((Function*)opaque)->name.c_str();
  device.launches[name]++;
  const uint3 grid{grid_x, grid_y, grid_z}, block{block_x, block_y, block_z};
  if (!cuda_cpu_launch(name, grid, block, shared, parameters)) return SUCCESS;
  if (!candle_cpu_launch(name, grid, block, shared, parameters)) return SUCCESS;
  fprintf(stderr, "emulated device: no kernel %s here\n", name);
  return INVALID_DEVICE_FUNCTION;
}

}  // extern "C"
