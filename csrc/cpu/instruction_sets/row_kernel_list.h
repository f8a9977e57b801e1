// The list of row kernels. Included once per instruction set, by row_kernels_<set>.cpp, which defines first:
//   DISTILLM_ISA    the inline namespace of everything that is listed here;
//   DISTILLM_LANES  floats per vector register. g++ before 13 reads a file's macros before its target pragmas, so that
//                   __AVX2__ tells nothing in here.
//
// Why a namespace: the linker merges inline functions and templates of one name into whichever copy it meets first. A
// copy compiled for AVX-512 must never stand in for that of another file, or the generic path ends in an illegal
// instruction. For the same reason row_kernels.h comes before the target pragma: it brings in the headers of torch, of
// csrc/ops and of the standard library, whose functions stay those of the default target. What is listed here includes
// nothing further outside of the namespace; the native test `instruction_sets` looks at the objects for it.
#include "../divergence/divergence_rows.h"
#include "../few_rows_linear/few_rows_linear_columns.h"
#include "../logprob_divergence/logprob_divergence_rows.h"
#include "../sparse_divergence/sparse_divergence_rows.h"
#include "../topk_logits/topk_logits_rows.h"

// Weights of tokens have the same bits on every instruction set: products and sums stay apart. Functions from the
// headers above are compiled without this setting, unless they are inlined: token sampling may take from there what
// compares, converts or selects, but no arithmetic that a fused multiply-add would round otherwise.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif
#include "../sample_tokens/sample_tokens_rows.h"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

namespace distillm {
inline namespace DISTILLM_ISA {

constexpr RowKernels kRowKernels = {
    find_divergence_rows, find_sparse_divergence_rows, find_logprob_divergence_rows, find_topk_logits_rows,
    sample_rows,          few_rows_linear_columns,
};

}  // namespace DISTILLM_ISA
}  // namespace distillm
