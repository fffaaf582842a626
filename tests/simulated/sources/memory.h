// Memory of the device, pinned memory, and a detector of accesses that nothing orders.
//
// As PyTorch's own allocators do: what is freed is given to the next one that asks on the same
// stream, at once, and behind the streams that it was recorded on. What is given is poisoned.
#pragma once

#include "streams.h"

#include <c10/core/Allocator.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <tuple>

namespace simulated {

// Where in the Python sources something happens: a number that the tests understand.
inline int (*where_in_python)() = nullptr;
inline int place_now() { return where_in_python ? where_in_python() : 0; }

struct Access {
  int stream = -1;  // none
  uint64_t tick = 0;
  int place = 0;
  const char* operation = "";

  bool is_seen_by(const Clock& clock) const {
    return stream < 0 ||
        (static_cast<size_t>(stream) < clock.size() && tick <= clock[stream]);
  }
};

// The last accesses to a few bytes.
struct Cell {
  static constexpr size_t NUM_BYTES = 16;
  Access write;
  std::vector<Access> reads;  // since that write, the last one of each stream
};

struct Block {
  char* data = nullptr;
  size_t num_bytes = 0;
  bool is_pinned = false;
  DeviceIndex device = 0;
  int stream = -1;                                // it was allocated on
  std::set<int> others;                           // it was recorded on
  std::vector<std::shared_ptr<Moment>> last_uses;  // not given away before these
  std::vector<Cell> cells;
};

using Race = std::tuple<const char*, int, const char*, int, int, const char*, int>;

struct Memory {
  std::map<char*, Block*> blocks;  // by address
  std::map<std::tuple<bool, DeviceIndex, int, size_t>, std::vector<Block*>> free_blocks;
  std::vector<Block*> freed_but_used;
  std::map<Race, int> races;
  uint64_t num_reused = 0;
};

inline Memory& memory() {
  static auto* all = new Memory;
  return *all;
}

inline Block* block_at(const void* address) {
  auto* byte = static_cast<char*>(const_cast<void*>(address));
  auto after = memory().blocks.upper_bound(byte);
  if (after == memory().blocks.begin()) return nullptr;
  Block* block = std::prev(after)->second;
  return byte < block->data + block->num_bytes ? block : nullptr;
}

inline bool is_pinned(const void* address) {
  Block* block = block_at(address);
  return block && block->is_pinned;
}

// ---- Races

// What an operation reads or writes: a strided piece of memory.
struct Use {
  char* data;
  std::vector<int64_t> sizes, strides;
  size_t element_bytes;
  bool is_write;
};

inline void note_race(const char* what, const Access& one, const Access& other) {
  memory().races[{what, one.stream, one.operation, one.place, other.stream, other.operation,
                  other.place}]++;
}

inline void touch(char* first, size_t num_bytes, bool is_write, const Access& now,
                  const Clock& clock) {
  Block* block = block_at(first);
  if (!block) return;
  if (block->cells.empty())
    block->cells.resize((block->num_bytes + Cell::NUM_BYTES - 1) / Cell::NUM_BYTES);
  size_t from = (first - block->data) / Cell::NUM_BYTES;
  size_t to = (first + num_bytes - 1 - block->data) / Cell::NUM_BYTES;
  for (size_t i = from; i <= to && i < block->cells.size(); ++i) {
    Cell& cell = block->cells[i];
    if (!cell.write.is_seen_by(clock))
      note_race(is_write ? "write after write" : "read after write", cell.write, now);
    if (is_write) {
      for (auto& read : cell.reads)
        if (!read.is_seen_by(clock)) note_race("write after read", read, now);
      cell.write = now;
      cell.reads.clear();
      continue;
    }
    auto known = std::find_if(cell.reads.begin(), cell.reads.end(),
                              [&](auto& read) { return read.stream == now.stream; });
    if (known != cell.reads.end()) *known = now;
    else cell.reads.push_back(now);
  }
}

inline void touch(const Use& use, size_t dim, char* data, const Access& now, const Clock& clock) {
  int64_t num_elements = 1;
  bool is_in_one_piece = true;
  for (size_t d = use.sizes.size(); d-- > dim;) {
    if (use.sizes[d] != 1 && use.strides[d] != num_elements) is_in_one_piece = false;
    num_elements *= use.sizes[d];
  }
  if (num_elements == 0) return;
  if (is_in_one_piece) {
    touch(data, num_elements * use.element_bytes, use.is_write, now, clock);
    return;
  }
  const auto step = use.strides[dim] * static_cast<int64_t>(use.element_bytes);
  for (int64_t i = 0; i < use.sizes[dim]; ++i) touch(use, dim + 1, data + i * step, now, clock);
}

// Puts work on a stream, and looks at what it reads and writes.
inline void enqueue(int number, const char* name, const std::vector<Use>& uses, int place,
                    std::function<void()> run) {
  auto& queue = streams().queues[number];
  join(queue.clock, streams().host);
  if (queue.clock.size() <= static_cast<size_t>(number)) queue.clock.resize(number + 1);
  const Access now{number, ++queue.clock[number], place, name};
  streams().num_operations++;
  for (bool is_write : {false, true})
    for (auto& use : uses)
      if (use.is_write == is_write && use.data) touch(use, 0, use.data, now, queue.clock);
  push(number, {Operation::RUN, std::move(run), nullptr});
}

// ---- Allocating

inline void make_free(Block* block) {
  memory()
      .free_blocks[{block->is_pinned, block->device, block->stream, block->num_bytes}]
      .push_back(block);
}

// Blocks whose last uses are over become free; that orders nobody but their next owner.
inline void collect_freed() {
  std::vector<Block*> still_used;
  for (Block* block : memory().freed_but_used) {
    auto& uses = block->last_uses;
    if (!std::all_of(uses.begin(), uses.end(), [](auto& use) { return use->has_come; })) {
      still_used.push_back(block);
      continue;
    }
    for (auto& use : uses)
      for (auto& cell : block->cells) {
        if (cell.write.is_seen_by(use->clock)) cell.write = Access{};
        std::erase_if(cell.reads, [&](auto& read) { return read.is_seen_by(use->clock); });
      }
    uses.clear();
    make_free(block);
  }
  memory().freed_but_used = std::move(still_used);
}

inline void release(void* context) {
  Lock lock;
  auto* block = static_cast<Block*>(context);
  for (int number : block->others) block->last_uses.push_back(record(number));
  block->others.clear();
  if (block->last_uses.empty()) make_free(block);
  else memory().freed_but_used.push_back(block);
}

inline Block* take_block(bool is_pinned, DeviceIndex device, int stream, size_t num_bytes) {
  constexpr size_t ROUNDING = 512;
  num_bytes = (num_bytes + ROUNDING - 1) / ROUNDING * ROUNDING;
  collect_freed();
  auto& free = memory().free_blocks[{is_pinned, device, stream, num_bytes}];
  if (!free.empty()) {
    Block* block = free.back();
    free.pop_back();
    memory().num_reused++;
    return block;
  }
  auto* block = new Block;
  block->data = static_cast<char*>(std::aligned_alloc(ROUNDING, num_bytes));
  block->num_bytes = num_bytes;
  block->is_pinned = is_pinned;
  block->device = device;
  block->stream = stream;
  std::memset(block->data, 0xAB, num_bytes);
  memory().blocks[block->data] = block;
  return block;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    const DeviceIndex device = current_device;
    if (num_bytes == 0) return {nullptr, Device(KIND, device)};
    const int place = place_now();
    Lock lock;
    const int number = streams().number_of(current_stream(device));
    Block* block = take_block(false, device, number, num_bytes);
    char* data = block->data;
    const size_t size = block->num_bytes;
    const Use whole{data, {static_cast<int64_t>(size)}, {1}, 1, true};
    enqueue(number, "allocate", {whole}, place, [=] { std::memset(data, 0xCD, size); });
    return {data, block, release, Device(KIND, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t num_bytes) const override {
    default_copy_data(to, from, num_bytes);
  }
};

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    if (num_bytes == 0) return {nullptr, Device(c10::kCPU)};
    Lock lock;
    Block* block = take_block(true, 0, -1, num_bytes);
    return {block->data, block, release, Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t num_bytes) const override {
    default_copy_data(to, from, num_bytes);
  }
};

inline DeviceAllocator device_allocator;
inline PinnedAllocator pinned_allocator;

}  // namespace simulated
