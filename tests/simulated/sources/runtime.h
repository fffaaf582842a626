// What PyTorch asks of a device: the current one, its streams, events, pinned memory.
#pragma once

#include "memory.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace simulated {

// Who polls an event must see it come some day, also in the lazy schedule.
constexpr double POLLING_HELPS = 0.2;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Event = std::shared_ptr<Moment>;

  static Event* of(void* event) { return static_cast<Event*>(event); }
  static DeviceIndex index_of(Device device) {
    return device.has_index() ? device.index() : current_device;
  }

  c10::DeviceType type() const override { return KIND; }
  DeviceIndex deviceCount() const noexcept override { return NUM_DEVICES; }
  Device getDevice() const override { return Device(KIND, current_device); }
  void setDevice(Device device) const override { current_device = index_of(device); }
  void uncheckedSetDevice(Device device) const noexcept override { setDevice(device); }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }

  Stream getStream(Device device) const noexcept override {
    return current_stream(index_of(device));
  }
  Stream getDefaultStream(Device device) const override {
    return Stream(Stream::UNSAFE, Device(KIND, index_of(device)), 0);
  }
  Stream getNewStream(Device device, int) const override {
    Lock lock;
    static StreamId last = 0;
    streams().number_of(index_of(device), ++last);
    return Stream(Stream::UNSAFE, Device(KIND, index_of(device)), last);
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getNewStream(device, 0);
  }
  Stream exchangeStream(Stream stream) const noexcept override {
    Stream before = current_stream(stream.device_index());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  bool queryStream(const Stream& stream) const override {
    Lock lock;
    auto& all = streams();
    const int number = all.number_of(stream);
    if (all.chance(POLLING_HELPS)) run_until(number, all.queues[number].num_issued);
    if (!all.queues[number].operations.empty()) return false;
    join(all.host, all.queues[number].clock);
    return true;
  }
  void synchronizeStream(const Stream& stream) const override {
    Lock lock;
    have_host_wait(streams().number_of(stream));
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    Lock lock;
    for (size_t number = 0; number < streams().queues.size(); ++number)
      if (streams().queues[number].device == device) have_host_wait(static_cast<int>(number));
  }

  void record(void** event, const Stream& stream, const DeviceIndex,
              const c10::EventFlag) const override {
    Lock lock;
    if (!*event) *event = new Event;
    *of(*event) = simulated::record(streams().number_of(stream));
  }
  void block(void* event, const Stream& stream) const override {
    Lock lock;
    if (event && *of(event)) have_stream_wait(streams().number_of(stream), *of(event));
  }
  bool queryEvent(void* event) const override {
    Lock lock;
    if (!event || !*of(event)) return true;
    Moment& moment = **of(event);
    if (!moment.has_come && streams().chance(POLLING_HELPS))
      run_until(moment.stream, moment.position);
    if (moment.has_come) join(streams().host, moment.clock);
    return moment.has_come;
  }
  void synchronizeEvent(void* event) const override {
    Lock lock;
    if (event && *of(event)) have_host_wait(**of(event));
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete of(event); }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0.0; }

  void recordDataPtrOnStream(const c10::DataPtr& data, const Stream& stream) const override {
    Lock lock;
    if (data.get_deleter() != release) return;
    auto* block = static_cast<Block*>(data.get_context());
    const int number = streams().number_of(stream);
    if (number != block->stream) block->others.insert(number);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return NUM_DEVICES; }
  void setCurrentDevice(DeviceIndex device) const override { current_device = device; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return std::exchange(current_device, device);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  bool isPinnedPtr(const void* address) const override {
    Lock lock;
    return is_pinned(address);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  // The CPU's: the same random numbers as without the device.
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t num_bytes) const override {
    auto data = device_allocator.allocate(num_bytes);
    const size_t num_kept = std::min(num_bytes, storage.nbytes());
    if (num_kept) {
      auto* to = static_cast<char*>(data.get());
      auto* from = static_cast<char*>(const_cast<void*>(storage.data()));
      const auto size = static_cast<int64_t>(num_kept);
      const int place = place_now();
      Lock lock;
      enqueue(streams().number_of(current_stream(current_device)), "resize",
              {Use{from, {size}, {1}, 1, false}, Use{to, {size}, {1}, 1, true}}, place,
              [=] { std::memcpy(to, from, num_kept); });
    }
    const_cast<c10::Storage&>(storage).set_data_ptr(std::move(data));
    const_cast<c10::Storage&>(storage).set_nbytes(num_bytes);
  }
};

}  // namespace simulated
