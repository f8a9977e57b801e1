// How the vocabulary entries count that a compressed teacher did not keep: see sparse_divergence.h.
#pragma once

#include <cstdint>

namespace distillm {

enum class Tail : int32_t { kBucket, kTruncate, kRenormalize, kSampled };

}  // namespace distillm
