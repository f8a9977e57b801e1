// How many temperatures compressed logits may be kept at.
#pragma once

namespace distillm {

constexpr int kMaxTemperatures = 16;

}  // namespace distillm
