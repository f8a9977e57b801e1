// What a loss says about a row beside its value.
#pragma once

namespace distillm {

constexpr int kMetrics = 3;  // teacher entropy, student entropy (nats, at the temperature), top-1 agreement

}  // namespace distillm
