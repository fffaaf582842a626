// Streams whose work runs late.
//
// A stream is a queue. What is put on it runs when somebody waits for it, or when the schedule says
// so: at once, as late as possible, or at random. Vector clocks tell what each stream, and the host,
// have seen of the other streams: who has not seen an access must not touch the same memory.
#pragma once

#include <c10/core/Stream.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace simulated {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
using c10::StreamId;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr int NUM_DEVICES = 2;

// For each stream, how many of its operations are known to be before.
using Clock = std::vector<uint64_t>;

inline void join(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

// A point in a stream that others can wait for: what an event records.
struct Moment {
  int stream;
  uint64_t position;
  Clock clock;
  bool has_come = false;
};

struct Operation {
  enum Kind { RUN, RECORD, WAIT } kind;
  std::function<void()> run;
  std::shared_ptr<Moment> moment;
};

struct Queue {
  DeviceIndex device;
  std::deque<Operation> operations;
  uint64_t num_issued = 0, num_executed = 0;
  Clock clock;
  double eagerness = 1.0;  // the chance that the next operation runs at once
};

enum Schedule { EAGER, LAZY, RANDOM };

struct Streams {
  std::recursive_mutex mutex;  // of everything here, and of the memory
  std::vector<Queue> queues;
  std::map<std::pair<DeviceIndex, StreamId>, int> numbers;
  Clock host;
  Schedule schedule = EAGER;
  std::mt19937_64 dice{0};
  uint64_t num_operations = 0;
  std::string error;

  bool chance(double probability) {
    return std::uniform_real_distribution<>(0, 1)(dice) < probability;
  }
  double draw_eagerness() {
    static const double choices[] = {0.0, 0.0, 0.05, 0.5, 1.0};
    return choices[dice() % std::size(choices)];
  }
  int number_of(DeviceIndex device, StreamId id) {
    auto [found, is_new] = numbers.try_emplace({device, id}, static_cast<int>(queues.size()));
    if (is_new) {
      Queue queue;
      queue.device = device;
      queue.eagerness = draw_eagerness();
      queues.push_back(std::move(queue));
    }
    return found->second;
  }
  int number_of(const Stream& stream) { return number_of(stream.device_index(), stream.id()); }
};

inline Streams& streams() {
  static auto* all = new Streams;  // never destroyed: tensors may outlive everything
  return *all;
}

// Held for none of Python's tensors: to let one go takes Python's lock, and who has that may wait for
// this one.
struct Lock : std::lock_guard<std::recursive_mutex> {
  Lock() : std::lock_guard<std::recursive_mutex>(streams().mutex) {}
};

inline thread_local DeviceIndex current_device = 0;
inline thread_local StreamId current_streams[NUM_DEVICES] = {};

inline Stream current_stream(DeviceIndex device) {
  return Stream(Stream::UNSAFE, Device(KIND, device), current_streams[device]);
}

// ---- Running

inline void run_until(int number, uint64_t position);

inline void run_next(int number) {
  auto& all = streams();
  Operation next = std::move(all.queues[number].operations.front());
  all.queues[number].operations.pop_front();
  if (next.kind == Operation::WAIT && !next.moment->has_come)
    run_until(next.moment->stream, next.moment->position);
  if (next.kind == Operation::RUN) {
    try {
      next.run();
    } catch (const std::exception& error) {
      if (all.error.empty()) all.error = error.what();
    }
  }
  all.queues[number].num_executed++;
  if (next.kind == Operation::RECORD) next.moment->has_come = true;
}

inline void run_until(int number, uint64_t position) {
  while (streams().queues[number].num_executed < position) run_next(number);
}

// What the schedule runs beside the host.
inline void run_some() {
  auto& all = streams();
  if (all.schedule == LAZY) return;
  for (size_t number = 0; number < all.queues.size(); ++number) {
    auto& queue = all.queues[number];
    while (!queue.operations.empty() &&
           (all.schedule == EAGER || all.chance(queue.eagerness))) {
      auto& next = queue.operations.front();
      if (next.kind == Operation::WAIT && !next.moment->has_come) break;
      run_next(static_cast<int>(number));
    }
  }
}

inline void push(int number, Operation operation) {
  auto& queue = streams().queues[number];
  queue.operations.push_back(std::move(operation));
  ++queue.num_issued;
  run_some();
}

// An error of an operation that ran late comes to whoever waits next, as on a GPU.
inline void raise_error() {
  std::string error = std::exchange(streams().error, {});
  TORCH_CHECK(error.empty(), "simulated accelerator: ", error);
}

// ---- Waiting

inline std::shared_ptr<Moment> record(int number) {
  auto& all = streams();
  join(all.queues[number].clock, all.host);
  auto moment = std::make_shared<Moment>(
      Moment{number, all.queues[number].num_issued + 1, all.queues[number].clock});
  push(number, {Operation::RECORD, nullptr, moment});
  return moment;
}

inline void have_stream_wait(int number, const std::shared_ptr<Moment>& moment) {
  join(streams().queues[number].clock, moment->clock);
  push(number, {Operation::WAIT, nullptr, moment});
}

inline void have_host_wait(const Moment& moment) {
  run_until(moment.stream, moment.position);
  join(streams().host, moment.clock);
  raise_error();
}

inline void have_host_wait(int number) {
  auto& all = streams();
  run_until(number, all.queues[number].num_issued);
  join(all.host, all.queues[number].clock);
  raise_error();
}

}  // namespace simulated
