// SPDX-License-Identifier: Apache-2.0
// Tensors that are held for many ops, which take a number in their place.
//
// The tensors of a slot, of a step and of the workspace are the same in every
// step. Twenty of them cost the host more than a launch: each passes PyTorch's
// dispatcher, and is checked. So they are passed once. The first op that uses
// them checks them, and its result serves the ops that follow, for as long as
// every tensor has the address and the size that it had. An op that asks for
// more than was checked, such as a longer step, has them checked again.
//
// What may differ from op to op, the stream above all, is checked in each.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <variant>

#include "checks.h"

namespace vllm_steering {

// What an op uses of the workspace; each kind includes those before it.
enum class Scratch { kNone, kLists, kScores };

// What is asked of held tensors: a check covers less, or the same.
struct Asked {
  Expected expected;
  Scratch scratch;
  int64_t tokens;

  bool covers(const Asked& other) const {
    return expected == other.expected && scratch >= other.scratch &&
           tokens >= other.tokens;
  }
};

// A value that is made when it is wanted first.
class Once {
 public:
  template <typename V, typename Make>
  const V& get(Make&& make) {
    std::call_once(flag_, [&] { value_ = std::make_shared<const V>(make()); });
    return *static_cast<const V*>(value_.get());
  }

 private:
  std::once_flag flag_;
  std::shared_ptr<const void> value_;
};

// Held tensors after their check, for a stream of type T.
template <typename T>
struct Checked {
  Step step;
  Weights<T> weights;
  Workspace<T> ws;
  Once encode_maps, dense_maps;  // of encode_launch.h and decode_launch.h
};

class Held {
 public:
  const Tensors step, weights, workspace;

  Held(Tensors step, Tensors weights, Tensors workspace)
      : step(std::move(step)),
        weights(std::move(weights)),
        workspace(std::move(workspace)) {}

  template <typename T>
  std::shared_ptr<Checked<T>> checked(const Asked& asked) {
    using Found = std::shared_ptr<Checked<T>>;
    const std::lock_guard lock(mutex_);
    if (!covered_.covers(asked) || is_changed()) {
      found_ = std::monostate();
      covered_ = {};  // nothing, should the check throw
      found_ = check<T>(asked);
      note(asked);
    }
    return std::get<Found>(found_);
  }

 private:
  struct Seen {
    const void* address;
    int64_t numel;
  };

  template <typename T>
  std::shared_ptr<Checked<T>> check(const Asked& asked) const {
    const Expected& e = asked.expected;
    auto made = std::make_shared<Checked<T>>();
    made->weights = make_weights<T>(weights, e);
    made->step = make_step(step, asked.tokens, e);
    if (made->step.reads.index != nullptr)
      vllm_steering::check(step[kReadScale], "read_scale", ScalarType::Float,
                           {made->weights.all_features}, e);
    if (asked.scratch != Scratch::kNone)
      made->ws = make_workspace<T>(workspace, made->weights,
                                   made->step.table.max_clamps,
                                   asked.scratch == Scratch::kScores, e);
    return made;
  }

  // Of a step that is shorter than the tensors have room for, all is covered.
  void note(const Asked& asked) {
    seen_.clear();
    for_all([&](const Tensor& t) {
      seen_.push_back({t.data_ptr(), t.numel()});
      return true;
    });
    covered_ = asked;
    covered_.tokens = most_tokens(step);
  }

  bool is_changed() const {
    size_t i = 0;
    return !for_all([&](const Tensor& t) {
      const Seen& seen = seen_[i++];
      return t.data_ptr() == seen.address && t.numel() == seen.numel;
    });
  }

  template <typename F>
  bool for_all(F&& f) const {
    for (const Tensors* bundle : {&step, &weights, &workspace})
      for (const Tensor& t : *bundle)
        if (!f(t)) return false;
    return true;
  }

  std::mutex mutex_;
  std::variant<std::monostate, std::shared_ptr<Checked<__nv_bfloat16>>,
               std::shared_ptr<Checked<__half>>>
      found_;
  Asked covered_ = {};
  std::vector<Seen> seen_;
};

// All that is held in this process, by number.
class HeldTable {
 public:
  int64_t add(std::shared_ptr<Held> held) {
    const std::lock_guard lock(mutex_);
    held_.emplace(++last_, std::move(held));
    return last_;
  }

  std::shared_ptr<Held> find(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto at = held_.find(number);
    STD_TORCH_CHECK(at != held_.end(), "steering: nothing is held as ", number);
    return at->second;
  }

  void remove(int64_t number) {
    std::shared_ptr<Held> last;  // tensors are freed without the lock
    const std::lock_guard lock(mutex_);
    const auto at = held_.find(number);
    if (at == held_.end()) return;
    last = std::move(at->second);
    held_.erase(at);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<Held>> held_;
  int64_t last_ = 0;
};

// Never destroyed: at the end of the process its tensors' allocator may be gone
// before it.
inline HeldTable& held_table() {
  static auto* table = new HeldTable();
  return *table;
}

// How the schema of an op on held tensors begins.
#define STEERING_HELD "int held, Tensor(a!)[] stream, "

// Whether an op's stream is what the encoder reads, or what the decoder writes.
enum class Side { kRead, kWritten };

// All that an op launches with.
template <typename T>
struct Bundles {
  Step step;
  Weights<T> weights;
  Stream<T> stream;
  Workspace<T> ws;
  Expected expected;
  std::shared_ptr<Held> held;
  std::shared_ptr<Checked<T>> checked;
};

template <typename T>
Bundles<T> make_bundles(int64_t number, const Tensors& stream, Side side,
                        Scratch scratch, int64_t base = 0) {
  STD_TORCH_CHECK(base >= 0, "steering: base ", base, " is negative");
  const Expected e = expected_of(stream);
  auto held = held_table().find(number);
  auto checked = held->template checked<T>(
      {e, scratch, get(stream, kHidden, "hidden").size(0)});
  const Weights<T>& w = checked->weights;
  const int ranks = w.all_features / w.num_features;
  const Stream<T> s =
      make_stream<T>(stream, side == Side::kRead ? w.d_in : w.d_out * ranks, e);
  Bundles<T> b = {checked->step,     w, s, checked->ws, e, std::move(held),
                  std::move(checked)};
  b.ws.base = static_cast<int>(base);
  if (scratch != Scratch::kScores) {
    b.ws.scores = nullptr;  // or the encoder would store all of them
    b.ws.kth = nullptr;
  }
  return b;
}

inline Scratch scratch_of(bool topk) {
  return topk ? Scratch::kScores : Scratch::kLists;
}

}  // namespace vllm_steering
