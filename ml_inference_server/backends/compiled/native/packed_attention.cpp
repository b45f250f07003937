// Attention over texts that lie one behind the other, without padding: torch.ops.mlis.packed_attention.
//
// q, k, v: (tokens, heads, dim); starts: (texts + 1) int64, text t is tokens starts[t] .. starts[t + 1] - 1. Tokens
// after the last text get zeros. Built and loaded by native/__init__.py. On processors with AMX, BF16 runs in tiles (16
// x 32 BF16 times 32 x 16 BF16); everything else runs PyTorch's own attention, once for each run of texts of the same
// length.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>

#include "attention.h"

namespace {

void zero_after(at::Tensor& out, const at::Tensor& starts) {
  const int64_t end = starts.const_data_ptr<int64_t>()[starts.size(0) - 1];
  TORCH_CHECK(end <= out.size(0), "packed_attention: the texts end at ", end, ", the tokens at ", out.size(0));
  auto after = out.slice(0, end);
  std::memset(after.mutable_data_ptr(), 0, after.nbytes());
}

#ifdef MLIS_AMX

using namespace mlis;

at::Tensor in_tiles(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& starts,
                    double scale, bool causal) {
  const auto qc = q.contiguous(), kc = k.contiguous(), vc = v.contiguous();
  auto out = at::empty(q.sizes(), q.options());
  zero_after(out, starts);
  auto data = [](const at::Tensor& t) { return reinterpret_cast<const uint16_t*>(t.const_data_ptr()); };
  attend(data(qc), data(kc), data(vc), reinterpret_cast<uint16_t*>(out.mutable_data_ptr()),
         starts.const_data_ptr<int64_t>(), starts.size(0) - 1, q.size(1), q.size(2), scale, causal);
  return out;
}

#endif  // MLIS_AMX

at::Tensor text_by_text(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& starts,
                        double scale, bool causal) {
  auto out = at::empty_like(q, q.options(), at::MemoryFormat::Contiguous);
  zero_after(out, starts);
  const int64_t* first = starts.const_data_ptr<int64_t>();
  const int64_t texts = starts.size(0) - 1, heads = q.size(1), dim = q.size(2);
  for (int64_t t = 0, next; t < texts; t = next) {
    const int64_t length = first[t + 1] - first[t];
    for (next = t + 1; next < texts && first[next + 1] - first[next] == length; ++next) {
    }
    auto part = [&](const at::Tensor& x) {
      return x.slice(0, first[t], first[next]).reshape({next - t, length, heads, dim}).transpose(1, 2);
    };
    out.slice(0, first[t], first[next])
        .view({next - t, length, heads, dim})
        .transpose(1, 2)
        .copy_(at::scaled_dot_product_attention(part(q), part(k), part(v), {}, 0.0, causal, scale));
  }
  return out;
}

bool uses_amx() {
#ifdef MLIS_AMX
  return amx_granted();
#else
  return false;
#endif
}

at::Tensor packed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& starts,
                            double scale, bool causal) {
  TORCH_CHECK(q.dim() == 3 && k.sizes() == q.sizes() && v.sizes() == q.sizes(), "q, k, v: (tokens, heads, dim)");
  TORCH_CHECK(starts.scalar_type() == at::kLong && starts.is_contiguous(), "starts: contiguous int64");
#ifdef MLIS_AMX
  if (q.scalar_type() == at::kBFloat16 && q.size(2) % 32 == 0 && amx_granted()) {
    return in_tiles(q, k, v, starts, scale, causal);
  }
#endif
  return text_by_text(q, k, v, starts, scale, causal);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mlis, m) {
  m.def("packed_attention(Tensor q, Tensor k, Tensor v, Tensor starts, float scale, bool causal) -> Tensor");
  m.def("uses_amx() -> bool", uses_amx);
}

TORCH_LIBRARY_IMPL(mlis, CPU, m) { m.impl("packed_attention", packed_attention); }
