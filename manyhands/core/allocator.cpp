// A caching allocator for CPU tensors.
//
// A training step asks for the same sizes again and again. The system's allocator gives large blocks back to the
// kernel and page-faults them anew in each step; here a freed block is kept and handed out to the next request of
// its size class (eight classes to a doubling: at most 12.5% slack, which is never touched). Large blocks are
// mappings of their own, aligned and advised for huge pages.
//
// Bound: blocks in use and kept never exceed the most that was ever in use at one time by more than a quarter (and
// 64 MiB), and blocks kept never exceed a limit; beyond that the block unused for longest goes back. One lock guards everything: it is held for a few
// loads and stores, never around a system call. Memory may be freed by any thread, and in forked children.
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <system_error>

namespace {

constexpr size_t kHuge = size_t{2} << 20;
constexpr size_t kSpare = size_t{64} << 20;
constexpr size_t kLargest = size_t{1} << 46;
constexpr uint64_t kSeal = 0x6d616e7968616e64;  // "manyhand"

struct alignas(64) Block {  // lies just before the bytes it describes
  uint64_t seal;            // kSeal ^ own address: tells our blocks from those made before we were installed
  size_t bytes;             // usable
  size_t mapped;            // length of its own mapping; 0: it came from posix_memalign
  size_t index;             // of its size class
  Block *above, *below;     // neighbours in its class's stack
  Block *newer, *older;     // neighbours in the order of release
};
static_assert(sizeof(Block) == 64, "data behind the header stays 64-byte aligned");

struct State {
  std::mutex lock;
  Block* top[512] = {};  // most recently released block of each class
  Block *newest = nullptr, *oldest = nullptr;
  uint64_t used = 0, kept = 0, peak = 0, hits = 0, misses = 0;
  uint64_t limit = 0;  // of bytes kept
};
State& state = *new State;  // never destroyed: tensors outlive static destructors

// Size class of n bytes; n becomes the class's size. Granularity: an eighth of the power of two below, at least 64.
size_t classify(size_t& n) {
  if (n < 64) n = 64;
  const int log = 63 - __builtin_clzll(n - 1);
  const int shift = log > 9 ? log - 3 : 6;
  n = (n + (size_t{1} << shift) - 1) >> shift << shift;
  return static_cast<size_t>(shift - 6) * 8 + (n >> shift);
}

Block* from_system(size_t bytes, size_t index) {
  void* place = nullptr;
  size_t mapped = 0;
  if (bytes >= kHuge) {
    mapped = (bytes + sizeof(Block) + 4095) & ~size_t{4095};
    char* wide = static_cast<char*>(
        mmap(nullptr, mapped + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (wide == MAP_FAILED) return nullptr;
    char* begin = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(wide) + kHuge - 1) & ~(kHuge - 1));
    if (begin != wide) munmap(wide, begin - wide);
    if (begin != wide + kHuge) munmap(begin + mapped, wide + kHuge - begin);
#ifdef MADV_HUGEPAGE
    madvise(begin, mapped, MADV_HUGEPAGE);
#endif
    place = begin;
  } else if (posix_memalign(&place, 64, bytes + sizeof(Block)) != 0) {
    return nullptr;
  }
  Block* block = static_cast<Block*>(place);
  *block = Block{kSeal ^ reinterpret_cast<uintptr_t>(block), bytes, mapped, index, nullptr, nullptr, nullptr, nullptr};
  return block;
}

void to_system(Block* block) {
  while (block != nullptr) {
    Block* next = block->older;
    block->seal = 0;
    if (block->mapped != 0) {
      munmap(block, block->mapped);
    } else {
      free(block);
    }
    block = next;
  }
}

void push(Block* block) {
  block->below = state.top[block->index];
  block->above = nullptr;
  if (block->below != nullptr) block->below->above = block;
  state.top[block->index] = block;
  block->older = state.newest;
  block->newer = nullptr;
  (state.newest != nullptr ? state.newest->newer : state.oldest) = block;
  state.newest = block;
  state.kept += block->bytes;
}

void take(Block* block) {
  (block->above != nullptr ? block->above->below : state.top[block->index]) = block->below;
  if (block->below != nullptr) block->below->above = block->above;
  (block->newer != nullptr ? block->newer->older : state.newest) = block->older;
  (block->older != nullptr ? block->older->newer : state.oldest) = block->newer;
  state.kept -= block->bytes;
}

// Takes the blocks unused for longest until the bounds hold (`all`: until none is kept); a list linked by `older`.
Block* surplus(bool all = false) {
  const uint64_t most = state.peak + state.peak / 4 + kSpare;
  Block* list = nullptr;
  while (state.oldest != nullptr && (all || state.kept > state.limit || state.used + state.kept > most)) {
    Block* block = state.oldest;
    take(block);
    block->older = list;
    list = block;
  }
  return list;
}

void release(void* data) {
  if (data == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(data);
  Block* block = static_cast<Block*>(data) - 1;
  if (block->seal != (kSeal ^ reinterpret_cast<uintptr_t>(block))) {  // from the default allocator, before our time
    free(data);
    return;
  }
  Block* list;
  {
    std::lock_guard<std::mutex> guard(state.lock);
    state.used -= block->bytes;
    push(block);
    list = surplus();
  }
  to_system(list);
}

void* obtain(size_t asked) {
  size_t bytes = asked;
  if (bytes > kLargest) return nullptr;
  const size_t index = classify(bytes);
  Block* list;
  {
    std::lock_guard<std::mutex> guard(state.lock);
    state.used += bytes;
    if (state.used > state.peak) state.peak = state.used;
    if (Block* block = state.top[index]) {
      take(block);
      ++state.hits;
      return block + 1;
    }
    ++state.misses;
    list = surplus();
  }
  to_system(list);
  Block* block = from_system(bytes, index);
  if (block == nullptr) {  // give everything kept back and try once more
    {
      std::lock_guard<std::mutex> guard(state.lock);
      list = surplus(true);
    }
    to_system(list);
    block = from_system(bytes, index);
  }
  if (block != nullptr) return block + 1;
  std::lock_guard<std::mutex> guard(state.lock);
  state.used -= bytes;
  return nullptr;
}

struct Caching final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : obtain(bytes);
    if (bytes != 0 && data == nullptr) {
      c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
      // the words that other libraries look for to tell an exhausted memory from other errors
      TORCH_CHECK(false, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", bytes,
                  " bytes. Error code ", ENOMEM, " (", std::generic_category().message(ENOMEM), ")");
    }
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

// Installs the allocator for all CPU tensors made from now on. `limit`: of bytes kept while nobody uses them.
extern "C" __attribute__((visibility("default"))) void manyhands_install_allocator(size_t limit) {
  static std::once_flag once;
  std::call_once(once, [limit] {
    state.limit = limit;
    pthread_atfork([] { state.lock.lock(); }, [] { state.lock.unlock(); }, [] { state.lock.unlock(); });
    c10::SetCPUAllocator(new Caching);
  });
}

// Gives everything kept back to the system.
extern "C" __attribute__((visibility("default"))) void manyhands_allocator_trim() {
  Block* list;
  {
    std::lock_guard<std::mutex> guard(state.lock);
    list = surplus(true);
  }
  to_system(list);
}

extern "C" __attribute__((visibility("default"))) size_t manyhands_allocator_kept() {
  std::lock_guard<std::mutex> guard(state.lock);
  return state.kept;
}

// figures[5]: bytes in use, bytes kept, most bytes in use at one time, requests served from kept blocks, and not.
extern "C" __attribute__((visibility("default"))) void manyhands_allocator_figures(uint64_t* figures) {
  std::lock_guard<std::mutex> guard(state.lock);
  figures[0] = state.used;
  figures[1] = state.kept;
  figures[2] = state.peak;
  figures[3] = state.hits;
  figures[4] = state.misses;
}
