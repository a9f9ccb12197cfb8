/* A stand-in for libcudart, libcublas and libnvrtc: a card whose memory lies on the host and whose kernels do nothing.

   It is preloaded, so that torch's CUDA libraries call it instead of NVIDIA's. Functions that are not here return 0
   ("success"); __init__.py writes them. What a kernel should compute, card_kernels.py computes on the CPU.

   A copy between pinned memory and the card arrives as late as on a real card: to the card at the next kernel, to the
   host at the next wait. What is copied to the host is what lay on the card at the call. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef cudaError_t E;
enum { HOST = 1, CARD = 2 }; /* as cudaMemoryTypeHost and cudaMemoryTypeDevice */

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static __thread int current;
static __thread E last_error;
static size_t used;

static E fail(E error) { return last_error = error; }
static size_t setting(const char *name, size_t otherwise) {
  return getenv(name) ? strtoull(getenv(name), 0, 10) : otherwise;
}
static size_t memory(void) { return setting("CARD_BYTES", 85045870592ull); }

/* ---------------------------------------------------------------- memory */

static struct range { char *start; size_t size; int kind; struct range *next; } *ranges;

static void note(void *start, size_t size, int kind) {
  struct range *range = malloc(sizeof *range);
  pthread_mutex_lock(&lock);
  *range = (struct range){start, size, kind, ranges};
  ranges = range;
  used += kind == CARD ? size : 0;
  pthread_mutex_unlock(&lock);
}

static void *reserve(size_t size, int kind) { /* takes no memory until it is written */
  void *start = mmap(0, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return 0;
  note(start, size ? size : 1, kind);
  return start;
}

static void release(void *start, int mapped) {
  pthread_mutex_lock(&lock);
  for (struct range **at = &ranges; *at; at = &(*at)->next)
    if ((*at)->start == start) {
      struct range *gone = *at;
      *at = gone->next;
      used -= gone->kind == CARD ? gone->size : 0;
      if (mapped) munmap(gone->start, gone->size);
      free(gone);
      break;
    }
  pthread_mutex_unlock(&lock);
}

static int kind_of(const void *pointer) {
  int kind = 0;
  pthread_mutex_lock(&lock);
  for (struct range *range = ranges; range && !kind; range = range->next)
    if ((char *)pointer >= range->start && (char *)pointer < range->start + range->size) kind = range->kind;
  pthread_mutex_unlock(&lock);
  return kind;
}

E cudaMalloc(void **pointer, size_t size) {
  if (used + size > memory() || !(*pointer = reserve(size, CARD))) return fail(cudaErrorMemoryAllocation);
  return 0;
}
E cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  return (*pointer = reserve(size, HOST)) ? 0 : fail(cudaErrorMemoryAllocation);
}
E cudaHostRegister(void *pointer, size_t size, unsigned flags) { note(pointer, size, HOST); return 0; }
E cudaMemGetInfo(size_t *unused, size_t *total) { *total = memory(); *unused = *total - used; return 0; }
E cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  memset(found, 0, sizeof *found);
  found->type = kind_of(pointer);
  found->device = found->type == CARD ? 0 : -1;
  if (found->type == CARD) found->devicePointer = (void *)pointer;
  if (found->type == HOST) found->hostPointer = (void *)pointer;
  return 0;
}
E cudaGetSymbolAddress(void **pointer, const void *symbol) { *pointer = reserve(1 << 16, CARD); return 0; }

/* ---------------------------------------------------------------- copies */

static struct late { char *to; const char *from; char *held; size_t size; struct late *next; } *late, **late_end = &late;

static void deliver(int to_host_too) {
  pthread_mutex_lock(&lock);
  for (struct late **at = &late; *at;) {
    struct late *copy = *at;
    if (copy->held && !to_host_too) {
      at = &copy->next;
      continue;
    }
    memcpy(copy->to, copy->held ? copy->held : copy->from, copy->size);
    *at = copy->next;
    free(copy->held);
    free(copy);
  }
  for (late_end = &late; *late_end; late_end = &(*late_end)->next) {}
  pthread_mutex_unlock(&lock);
}

void card_kernel(void) { deliver(0); } /* what each kernel does first; card_kernels.py and nccl.c call it */

E cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  int there = kind_of(to), here = kind_of(from);
  if (there && here && there != here) {
    struct late *copy = calloc(1, sizeof *copy);
    deliver(0);
    *copy = (struct late){to, from, 0, size, 0};
    if (there == HOST) copy->held = memcpy(malloc(size), from, size);
    pthread_mutex_lock(&lock);
    *late_end = copy;
    late_end = &copy->next;
    pthread_mutex_unlock(&lock);
    return 0;
  }
  deliver(there != CARD || here != CARD);
  memmove(to, from, size);
  return 0;
}
E cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  deliver(1);
  memmove(to, from, size);
  return 0;
}
E cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, size, 0, stream);
}
E cudaMemcpy2DAsync(void *to, size_t to_step, const void *from, size_t from_step, size_t width, size_t height,
                    enum cudaMemcpyKind kind, cudaStream_t stream) {
  deliver(1);
  for (size_t row = 0; row < height; row++) memmove((char *)to + row * to_step, (char *)from + row * from_step, width);
  return 0;
}
E cudaMemset(void *to, int value, size_t size) { deliver(0); memset(to, value, size); return 0; }
E cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) { return cudaMemset(to, value, size); }
E cudaFree(void *pointer) { deliver(1); release(pointer, 1); return 0; }
E cudaFreeHost(void *pointer) { deliver(1); release(pointer, 1); return 0; }
E cudaHostUnregister(void *pointer) { deliver(1); release(pointer, 0); return 0; }

/* ---------------------------------------------------------------- waits */

E cudaDeviceSynchronize(void) { deliver(1); return 0; }
E cudaStreamSynchronize(cudaStream_t stream) { deliver(1); return 0; }
E cudaStreamQuery(cudaStream_t stream) { return late ? cudaErrorNotReady : 0; }
E cudaEventSynchronize(cudaEvent_t event) { deliver(1); return 0; }
E cudaEventQuery(cudaEvent_t event) { return late ? cudaErrorNotReady : 0; }
E cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) { deliver(1); function(data); return 0; }
E cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = calloc(1, sizeof(double)); return 0; }
E cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
E cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *(double *)event = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
  return 0;
}
E cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaEventRecord(event, stream); }
E cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { *ms = *(double *)to - *(double *)from; return 0; }
E cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { *stream = calloc(1, 1); return 0; }
E cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { *stream = calloc(1, 1); return 0; }
E cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return 0; }
E cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = 0; return 0; }
E cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                           cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  *status = 0;
  return 0;
}

/* ---------------------------------------------------------------- the card: an H100's numbers */

E cudaGetDeviceCount(int *count) { *count = setting("CARD_COUNT", 1); return 0; }
E cudaGetDevice(int *device) { *device = current; return 0; }
E cudaSetDevice(int device) { current = device; return 0; }
E cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  *found = (struct cudaDeviceProp){
      .name = "stand-in", .totalGlobalMem = memory(), .sharedMemPerBlock = 49152, .regsPerBlock = 65536, .warpSize = 32,
      .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535}, .major = 9,
      .textureAlignment = 512, .multiProcessorCount = 132, .unifiedAddressing = 1, .l2CacheSize = 50 << 20,
      .maxThreadsPerMultiProcessor = 2048, .sharedMemPerMultiprocessor = 233472, .regsPerMultiprocessor = 65536,
      .sharedMemPerBlockOptin = 232448, .maxBlocksPerMultiProcessor = 32};
  return 0;
}
E cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp card;
  cudaGetDeviceProperties(&card, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = card.major; break;
    case cudaDevAttrMultiProcessorCount: *value = card.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = card.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = card.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = card.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = card.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: *value = card.maxThreadsPerBlock; break;
    case cudaDevAttrWarpSize: *value = card.warpSize; break;
    case cudaDevAttrMaxGridDimX: *value = card.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = card.maxGridSize[1]; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = card.regsPerBlock; break;
    case cudaDevAttrUnifiedAddressing: *value = card.unifiedAddressing; break;
    default: *value = 0;
  }
  return 0;
}
E cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 1; return 0; }
E cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
E cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
E cudaGetLastError(void) { E error = last_error; last_error = 0; return error; }
E cudaPeekAtLastError(void) { return last_error; }

static int nothing(void) { return 0; }
E cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                   enum cudaDriverEntryPointQueryResult *found) {
  *function = nothing;
  if (found) *found = 0;
  return 0;
}

/* ---------------------------------------------------------------- kernels */

E cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
  *found = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = 90, .binaryVersion = 90,
                                       .maxDynamicSharedSizeBytes = 232448};
  return 0;
}
E cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared,
                                                         unsigned flags) { *blocks = 2; return 0; }
E cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  card_kernel();
  return 0;
}
E cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *function, void **arguments) { card_kernel(); return 0; }
E __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  card_kernel();
  return 0;
}
E __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }

static int math_mode, pointer_mode;
int cublasCreate_v2(void **handle) { *handle = calloc(1, 64); return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = math_mode; return 0; }
int cublasSetMathMode(void *handle, int mode) { math_mode = mode; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = pointer_mode; return 0; }
int cublasSetPointerMode_v2(void *handle, int mode) { pointer_mode = mode; return 0; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { *made = calloc(1, 512); return 0; }
int cublasLtMatrixLayoutCreate(void **made, int type, uint64_t rows, uint64_t columns, int64_t step) {
  *made = calloc(1, 512);
  return 0;
}
int cublasLtMatmulPreferenceCreate(void **made) { *made = calloc(1, 512); return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *what, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *algorithms, int *found) {
  memset(algorithms, 0, 112); /* one cublasLtMatmulHeuristicResult_t */
  *found = 1;
  return 0;
}
