/* A stand-in for libnccl: processes on this machine exchange through shared memory, one call after another.

   All processes make the same calls in the same order; a group is one send and one receive, as in recursive doubling. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PIECE (4u << 20) /* bytes that a process shows to the others at once */

/* As in nccl.h, which pip installs without the headers that it includes. */
typedef int ncclResult_t, ncclDataType_t;
typedef struct ncclComm *ncclComm_t;
typedef struct { char internal[128]; } ncclUniqueId;
typedef void *cudaStream_t;
enum { ncclSystemError = 2, NCCL_VERSION_CODE = 22809 };

void card_kernel(void);

struct shared { atomic_int arrived, round; };
struct ncclComm { int size, rank; struct shared *shared; char *places; };
static __thread int depth;
static __thread struct { const char *from; char *to; size_t bytes; int peer; ncclComm_t all; } exchange;

static size_t bytes_of(size_t count, ncclDataType_t type) {
  static const unsigned char sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return count * sizes[type];
}

static void meet(ncclComm_t all) {
  int round = atomic_load(&all->shared->round);
  if (atomic_fetch_add(&all->shared->arrived, 1) == all->size - 1) {
    atomic_store(&all->shared->arrived, 0);
    atomic_fetch_add(&all->shared->round, 1);
  }
  while (atomic_load(&all->shared->round) == round) nanosleep(&(struct timespec){0, 20000}, 0);
}

/* Show own bytes, if there are any, and copy those of the processes first..last to `to`, each behind the one before. */
static void show_and_read(ncclComm_t all, const char *own, char *to, size_t bytes, int first, int last) {
  card_kernel();
  for (size_t at = 0; at < bytes; at += PIECE) {
    size_t size = bytes - at < PIECE ? bytes - at : PIECE;
    if (own) memcpy(all->places + (size_t)all->rank * PIECE, own + at, size);
    meet(all);
    for (int rank = first; rank <= last; rank++)
      memcpy(to + (rank - first) * bytes + at, all->places + (size_t)rank * PIECE, size);
    meet(all);
  }
}

ncclResult_t ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; return 0; }
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  int file = open("/dev/urandom", O_RDONLY);
  ssize_t size = read(file, id, sizeof *id);
  close(file);
  return size == sizeof *id ? 0 : ncclSystemError;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *made, int size, ncclUniqueId id, int rank, void *config) {
  char name[64] = "/dev/shm/card-";
  for (int i = 0; i < 12; i++) sprintf(name + strlen(name), "%02x", (unsigned char)id.internal[i]);
  int file = open(name, O_RDWR | O_CREAT, 0600);
  size_t bytes = 4096 + (size_t)size * PIECE;
  if (file < 0 || ftruncate(file, bytes)) return ncclSystemError;
  char *shared = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  *made = malloc(sizeof **made);
  **made = (struct ncclComm){size, rank, (struct shared *)shared, shared + 4096};
  meet(*made);
  unlink(name);
  return 0;
}
ncclResult_t ncclCommInitRank(ncclComm_t *made, int size, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(made, size, id, rank, 0);
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t all, ncclResult_t *error) { *error = 0; return 0; }
ncclResult_t ncclCommCount(const ncclComm_t all, int *size) { *size = all->size; return 0; }
ncclResult_t ncclCommUserRank(const ncclComm_t all, int *rank) { *rank = all->rank; return 0; }
const char *ncclGetErrorString(ncclResult_t error) { return "stand-in for NCCL"; }
const char *ncclGetLastError(ncclComm_t all) { return ""; }

ncclResult_t ncclAllGather(const void *own, void *to, size_t count, ncclDataType_t type, ncclComm_t all, cudaStream_t stream) {
  show_and_read(all, own, to, bytes_of(count, type), 0, all->size - 1);
  return 0;
}
ncclResult_t ncclBroadcast(const void *own, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t all,
                           cudaStream_t stream) {
  show_and_read(all, all->rank == root ? own : 0, to, bytes_of(count, type), root, root);
  return 0;
}
ncclResult_t ncclBcast(void *own, size_t count, ncclDataType_t type, int root, ncclComm_t all, cudaStream_t stream) {
  return ncclBroadcast(own, own, count, type, root, all, stream);
}
ncclResult_t ncclSend(const void *own, size_t count, ncclDataType_t type, int peer, ncclComm_t all, cudaStream_t stream) {
  exchange.from = own, exchange.bytes = bytes_of(count, type), exchange.all = all;
  return 0;
}
ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t all, cudaStream_t stream) {
  exchange.to = to, exchange.peer = peer;
  return 0;
}
ncclResult_t ncclGroupStart(void) { depth++; return 0; }
ncclResult_t ncclGroupEnd(void) {
  if (--depth == 0 && exchange.all) {
    show_and_read(exchange.all, exchange.from, exchange.to, exchange.bytes, exchange.peer, exchange.peer);
    exchange.all = 0;
  }
  return 0;
}
