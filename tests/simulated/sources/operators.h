// Tensors of the device, and its kernels: the CPU's, run late on addresses, as a GPU's are.
#pragma once

#include "runtime.h"

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <optional>

namespace simulated {

using at::Tensor;
using OptionalTensors = c10::List<std::optional<Tensor>>;

// Whether a copy of pageable memory that nobody waits for reads it late, as on MPS. On other devices
// such memory has been read when the call returns.
inline bool pageable_copies_are_late = false;

// A tensor without what PyTorch keeps of it: what a kernel gets.
struct Piece {
  char* data;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
  size_t element_bytes;

  explicit Piece(const Tensor& tensor)
      : data(tensor.numel() ? static_cast<char*>(tensor.data_ptr()) : nullptr),
        sizes(tensor.sizes().vec()),
        strides(tensor.strides().vec()),
        dtype(tensor.scalar_type()),
        element_bytes(tensor.element_size()) {}

  Tensor on_cpu() const {
    return at::from_blob(data, sizes, strides,
                         at::TensorOptions().dtype(dtype).device(c10::kCPU));
  }
  void fill_from(const Tensor& values) const {
    auto place = on_cpu();
    place.copy_(values);
  }
  Use read() const { return {data, sizes, strides, element_bytes, false}; }
  Use write() const { return {data, sizes, strides, element_bytes, true}; }
};

// A kernel is below autograd, autocast and what Python adds.
struct BelowAutograd {
  c10::impl::ExcludeDispatchKeyGuard autograd{c10::autograd_dispatch_keyset_with_ADInplaceOrView};
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
  c10::impl::ExcludeDispatchKeyGuard python{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
};

inline bool is_ours(const Tensor& tensor) { return tensor.device().type() == KIND; }

// Whether it stands for a number in the Python sources, and promotes types as one.
inline bool is_number(const Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->is_wrapped_number();
}

inline int queue_of(DeviceIndex device) { return streams().number_of(current_stream(device)); }

// ---- Memory of tensors

inline Device with_index(std::optional<Device> device) {
  return device && device->has_index() ? *device : Device(KIND, current_device);
}

inline at::ScalarType named_dtype(std::optional<at::ScalarType> dtype) {
  return dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype()));
}

inline Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                            std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                            std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(with_index(device));
  return at::detail::empty_strided_generic(size, stride, &device_allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           named_dtype(dtype));
}

inline Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                    std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>,
                    std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(with_index(device));
  return at::detail::empty_generic(size, &device_allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   named_dtype(dtype), format);
}

inline Tensor empty_like(const Tensor& shape, DeviceIndex device) {
  return empty_strided(shape.sizes(), shape.strides(), shape.scalar_type(), {},
                       Device(KIND, device), {});
}

inline void record_stream(Tensor& self, Stream stream) {
  Guard().recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

// ---- Copies

// The current stream of one device waits for that of another.
inline void have_device_wait(DeviceIndex waiting, DeviceIndex awaited) {
  auto moment = record(queue_of(awaited));
  have_stream_wait(queue_of(waiting), moment);
}

inline Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.is_same(source)) return self;
  BelowAutograd below;
  const Tensor from = source.expand(self.sizes());
  if (self.numel() == 0) return self;
  const int place = place_now();
  const bool from_host = source.device().is_cpu(), to_host = self.device().is_cpu();
  const bool between_devices = !from_host && !to_host && self.device() != source.device();
  const DeviceIndex device = from_host ? self.device().index() : source.device().index();
  const char* name = from_host ? "copy to device" : to_host ? "copy to host" : "copy";
  Lock lock;
  const int number = queue_of(device);
  if (between_devices) have_device_wait(device, self.device().index());
  const Tensor& on_host = from_host ? from : self;
  const bool is_pageable = (from_host || to_host) && !is_pinned(on_host.data_ptr());
  const bool is_late = non_blocking && (!is_pageable || pageable_copies_are_late);
  const Piece to(self);
  if (from_host && is_pageable && !is_late) {
    const Tensor staged = from.clone();  // it has been read when the call returns
    enqueue(number, name, {to.write()}, place, [to, staged] {
      BelowAutograd below;
      to.fill_from(staged);
    });
    if (!non_blocking) have_host_wait(number);
    return self;
  }
  const Piece original(from);
  enqueue(number, name, {original.read(), to.write()}, place, [to, original] {
    BelowAutograd below;
    to.fill_from(original.on_cpu());
  });
  if (!is_pageable && (from_host || to_host)) {  // as CUDA's pinned memory is not given away before
    auto& uses = block_at(on_host.data_ptr())->last_uses;
    std::erase_if(uses, [&](auto& use) { return use->stream == number; });
    uses.push_back(record(number));
  }
  if (!is_late && (from_host || to_host)) have_host_wait(number);
  if (between_devices) have_device_wait(self.device().index(), device);
  return self;
}

inline Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  Tensor place = to;
  copy_(place, self, non_blocking);
  return to;
}

inline Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

inline at::Scalar local_scalar_dense(const Tensor& self) {
  const Tensor value = at::empty({}, at::TensorOptions().dtype(self.scalar_type()));
  Tensor place = value;
  copy_(place, self.reshape({}), false);
  return value.item();
}

// ---- All other operators

struct Call {
  const c10::OperatorHandle& operation;
  const c10::FunctionSchema& schema;
  std::vector<c10::IValue> arguments;  // devices replaced by the CPU
  std::vector<int> same_as;            // for each result: the argument that it is, or -1
  DeviceIndex device = current_device;
  bool is_random = false;

  Call(const c10::OperatorHandle& operation, std::vector<c10::IValue> given)
      : operation(operation), schema(operation.schema()), arguments(std::move(given)) {
    std::optional<Device> found;
    for (size_t i = 0; i < arguments.size(); ++i)
      each_tensor(i, [&](const Tensor& tensor) {
        if (is_ours(tensor) && !found) found = tensor.device();
      });
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (arguments[i].isDevice()) {
        if (!found) found = arguments[i].toDevice();
        arguments[i] = Device(c10::kCPU);
      }
      is_random |= arguments[i].isGenerator() || schema.arguments()[i].name() == "generator";
    }
    if (found && found->has_index()) device = found->index();
    for (auto& result : schema.returns()) {
      same_as.push_back(-1);
      for (size_t i = 0; i < arguments.size() && result.alias_info(); ++i) {
        const auto* alias = schema.arguments()[i].alias_info();
        if (alias && alias->beforeSets() == result.alias_info()->beforeSets())
          same_as.back() = static_cast<int>(i);
      }
    }
  }

  bool writes(size_t argument) const {
    const auto* alias = schema.arguments()[argument].alias_info();
    return alias && alias->isWrite();
  }

  // What it reads and writes on the device.
  std::vector<Use> uses() const {
    std::vector<Use> found;
    for (size_t i = 0; i < arguments.size(); ++i)
      each_tensor(i, [&](const Tensor& tensor) {
        if (is_ours(tensor))
          found.push_back(writes(i) ? Piece(tensor).write() : Piece(tensor).read());
      });
    return found;
  }

  template <class Act>
  void each_tensor(size_t argument, Act&& act) const {
    const auto& value = arguments[argument];
    if (value.isTensor()) {
      if (value.toTensor().defined()) act(value.toTensor());
    } else if (value.isTensorList()) {
      for (const Tensor& tensor : value.toTensorVector())
        if (tensor.defined()) act(tensor);
    } else if (value.isOptionalTensorList()) {
      for (const auto& tensor : value.toOptionalTensorVector())
        if (tensor && tensor->defined()) act(*tensor);
    }
  }

  // The arguments with other tensors in the place of theirs.
  template <class Change>
  std::vector<c10::IValue> with(Change&& change) const {
    auto changed = arguments;
    auto other = [&](const Tensor& tensor) { return tensor.defined() ? change(tensor) : tensor; };
    for (auto& value : changed) {
      if (value.isTensor()) {
        value = other(value.toTensor());
      } else if (value.isTensorList()) {
        std::vector<Tensor> tensors;
        for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(other(tensor));
        value = tensors;
      } else if (value.isOptionalTensorList()) {
        OptionalTensors tensors;
        for (const auto& tensor : value.toOptionalTensorVector())
          tensors.push_back(tensor ? std::optional<Tensor>(other(*tensor)) : std::nullopt);
        value = tensors;
      }
    }
    return changed;
  }

  // The results' shapes, from the meta kernels; nothing where these do not know.
  std::optional<torch::jit::Stack> shapes() const {
    if (is_random) return {};
    auto stack = with([](const Tensor& tensor) -> Tensor {
      if (is_number(tensor) || (tensor.dim() == 0 && tensor.device().is_cpu())) return tensor;
      return at::detail::empty_strided_meta(tensor.sizes(), tensor.strides(),
                                            tensor.scalar_type());
    });
    for (auto& value : stack)
      if (value.isDevice()) value = Device(c10::kMeta);
    const auto given = stack;
    try {
      operation.callBoxed(&stack);
    } catch (const c10::NotImplementedError&) {
      return {};
    }
    for (auto& value : stack)
      if (!value.isTensor() && !value.isTensorList()) return {};
    for (size_t i = 0; i < arguments.size(); ++i) {  // out= may be too small
      if (!schema.arguments()[i].is_out() || !arguments[i].isTensor()) continue;
      const Tensor out = arguments[i].toTensor();
      if (out.sizes() != given[i].toTensor().sizes()) out.resize_(given[i].toTensor().sizes());
    }
    return stack;
  }
};

// As on a device whose kernel happens to be through when the call returns.
inline torch::jit::Stack run_now(const Call& call, int place) {
  {
    const auto uses = call.uses();
    Lock lock;
    const int number = queue_of(call.device);
    enqueue(number, call.schema.name().c_str(), uses, place, [] {});
    have_host_wait(number);
  }
  auto stack = call.with(
      [](const Tensor& tensor) { return is_ours(tensor) ? Piece(tensor).on_cpu() : tensor; });
  call.operation.callBoxed(&stack);
  auto on_device = [&](const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    Tensor made = empty_like(tensor, call.device);
    return copy_(made, tensor, true);
  };
  for (size_t r = 0; r < stack.size(); ++r) {
    if (call.same_as[r] >= 0) continue;
    if (stack[r].isTensor()) {
      stack[r] = on_device(stack[r].toTensor());
    } else if (stack[r].isTensorList()) {
      std::vector<Tensor> tensors;
      for (const Tensor& tensor : stack[r].toTensorVector()) tensors.push_back(on_device(tensor));
      stack[r] = tensors;
    }
  }
  return stack;
}

inline torch::jit::Stack run_late(const Call& call, torch::jit::Stack results, int place) {
  auto uses = call.uses();
  std::vector<std::vector<Piece>> made(results.size());
  for (size_t r = 0; r < results.size(); ++r) {
    if (call.same_as[r] >= 0) continue;
    auto make = [&](const Tensor& shape) {
      if (!shape.defined()) return shape;
      Tensor tensor = empty_like(shape, call.device);
      made[r].emplace_back(tensor);
      uses.push_back(made[r].back().write());
      return tensor;
    };
    if (results[r].isTensor()) {
      results[r] = make(results[r].toTensor());
    } else {
      std::vector<Tensor> tensors;
      for (const Tensor& shape : results[r].toTensorVector()) tensors.push_back(make(shape));
      results[r] = tensors;
    }
  }
  // What the kernel gets: addresses, and copies of what lies in CPU memory.
  auto given = call.with([](const Tensor& tensor) {
    const Tensor value = is_ours(tensor) ? Piece(tensor).on_cpu() : tensor.clone();
    if (is_number(tensor)) value.unsafeGetTensorImpl()->set_wrapped_number(true);
    return value;
  });
  auto run = [operation = call.operation, given, made, same_as = call.same_as] {
    BelowAutograd below;
    torch::jit::Stack stack = given;
    operation.callBoxed(&stack);
    for (size_t r = 0; r < made.size(); ++r) {
      if (same_as[r] >= 0) continue;
      size_t next = 0;
      auto store = [&](const Tensor& values) {
        if (values.defined()) made[r][next++].fill_from(values);
      };
      if (stack[r].isTensor()) store(stack[r].toTensor());
      else
        for (const Tensor& values : stack[r].toTensorVector()) store(values);
    }
  };
  Lock lock;
  enqueue(queue_of(call.device), call.schema.name().c_str(), uses, place, std::move(run));
  return results;
}

inline void run_operator(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto given = torch::jit::pop(*stack, operation.schema().arguments().size());
  const int place = place_now();
  BelowAutograd below;
  const Call call(operation, {given.begin(), given.end()});
  c10::DeviceGuard guard(Device(KIND, call.device));
  auto shapes = call.shapes();
  auto results = shapes ? run_late(call, std::move(*shapes), place) : run_now(call, place);
  for (size_t r = 0; r < results.size(); ++r)
    stack->push_back(call.same_as[r] >= 0 ? given[call.same_as[r]] : results[r]);
}

// Convolutions call another operator on devices of other makers: it is the CPU's here.
template <class Run>
std::vector<Tensor> convolve(const char* name, const std::vector<Tensor>& inputs, Run run) {
  const int place = place_now();
  BelowAutograd below;
  c10::DeviceGuard guard(inputs[0].device());
  const DeviceIndex device = inputs[0].device().index();
  std::vector<Use> uses;
  std::vector<std::optional<Piece>> from, to;
  std::vector<Tensor> shapes, outputs;
  for (auto& input : inputs) {
    from.emplace_back();
    shapes.emplace_back();
    if (!input.defined()) continue;
    from.back().emplace(input);
    uses.push_back(from.back()->read());
    shapes.back() =
        at::detail::empty_strided_meta(input.sizes(), input.strides(), input.scalar_type());
  }
  for (auto& shape : run(shapes)) {
    to.emplace_back();
    outputs.push_back(shape.defined() ? empty_like(shape, device) : shape);
    if (!shape.defined()) continue;
    to.back().emplace(outputs.back());
    uses.push_back(to.back()->write());
  }
  Lock lock;
  enqueue(queue_of(device), name, uses, place, [=] {
    BelowAutograd below;
    std::vector<Tensor> values;
    for (auto& piece : from) values.push_back(piece ? piece->on_cpu() : Tensor());
    const auto results = run(values);
    for (size_t i = 0; i < results.size(); ++i)
      if (to[i]) to[i]->fill_from(results[i]);
  });
  return outputs;
}

inline Tensor convolution(const Tensor& input, const Tensor& weight,
                          const std::optional<Tensor>& bias, c10::IntArrayRef stride,
                          c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                          c10::IntArrayRef output_padding, int64_t groups) {
  auto run = [stride = stride.vec(), padding = padding.vec(), dilation = dilation.vec(), transposed,
              output_padding = output_padding.vec(), groups](const std::vector<Tensor>& in) {
    const auto bias = in[2].defined() ? std::optional<Tensor>(in[2]) : std::nullopt;
    return std::vector<Tensor>{at::convolution(in[0], in[1], bias, stride, padding, dilation,
                                               transposed, output_padding, groups)};
  };
  return convolve("convolution", {input, weight, bias.value_or(Tensor())}, run)[0];
}

inline std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
    c10::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  auto run = [stride = stride.vec(), padding = padding.vec(), dilation = dilation.vec(), transposed,
              output_padding = output_padding.vec(), groups, mask](const std::vector<Tensor>& in) {
    auto [of_input, of_weight, of_bias] = at::convolution_backward(
        in[0], in[1], in[2], std::vector<int64_t>{in[0].size(1)}, stride, padding, dilation,
        transposed, output_padding, groups, mask);
    return std::vector<Tensor>{of_input, of_weight, of_bias};
  };
  auto gradients = convolve("convolution_backward", {gradient, input, weight}, run);
  return {gradients[0], gradients[1], gradients[2]};
}

inline const Tensor& resize_(const Tensor& self, c10::IntArrayRef size,
                             std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, size, format);
}

inline Tensor& set_from_storage(Tensor& self, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return at::native::set_storage_cpu_(self, std::move(source), 0, {size}, {});
}

inline Tensor& set_from_part(Tensor& self, at::Storage source, int64_t offset,
                             c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

}  // namespace simulated
