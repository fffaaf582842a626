// A simulated accelerator for tests: tensors in ordinary memory, on streams whose work runs late,
// with a detector of accesses that nothing orders. No Python in it: ctypes loads it.
#include "operators.h"

#include <sstream>

using namespace simulated;

namespace simulated {
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", simulated::empty);
  library.impl("empty_strided", simulated::empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("resize_", simulated::resize_);
  library.impl("set_.source_Storage", set_from_storage);
  library.impl("set_.source_Storage_storage_offset", set_from_part);
  library.impl("copy_", simulated::copy_);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar_dense);
  library.impl("record_stream", simulated::record_stream);
  library.impl("convolution_overrideable", simulated::convolution);
  library.impl("convolution_backward_overrideable", simulated::convolution_backward);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_operator>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

namespace at {  // where the macros look for their names
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(convolution, lower_precision_fp)
}
}  // namespace at

static const bool is_registered = [] {
  c10::SetAllocator(KIND, &device_allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

extern "C" {

// Ends all work, forgets races; what comes later is scheduled in this way.
void simulated_begin(int schedule, uint64_t seed, int late_pageable_copies) {
  Lock lock;
  auto& all = streams();
  for (size_t number = 0; number < all.queues.size(); ++number)
    run_until(static_cast<int>(number), all.queues[number].num_issued);
  for (auto& queue : all.queues) join(all.host, queue.clock);
  all.error.clear();
  all.schedule = static_cast<Schedule>(schedule);
  all.dice.seed(seed);
  for (auto& queue : all.queues) queue.eagerness = all.draw_eagerness();
  all.num_operations = memory().num_reused = 0;
  memory().races.clear();
  pageable_copies_are_late = late_pageable_copies;
}

// Gives numbers to places in the Python sources.
void simulated_locate(int (*where)()) { where_in_python = where; }

uint64_t simulated_num_operations() {
  Lock lock;
  return streams().num_operations;
}

uint64_t simulated_num_waiting() {
  Lock lock;
  uint64_t num_waiting = 0;
  for (auto& queue : streams().queues) num_waiting += queue.operations.size();
  return num_waiting;
}

uint64_t simulated_num_reused() {
  Lock lock;
  return memory().num_reused;
}

// One a line: what | stream | operation | place | stream | operation | place | how often.
const char* simulated_races() {
  static std::string text;
  Lock lock;
  std::ostringstream lines;
  for (auto& [race, count] : memory().races) {
    std::apply([&](auto&... part) { ((lines << part << '|'), ...); }, race);
    lines << count << '\n';
  }
  text = lines.str();
  return text.c_str();
}

}  // extern "C"
