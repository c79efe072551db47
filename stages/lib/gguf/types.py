"""The GGUF types: how far from the merged model each may be, and which need an importance matrix."""

# The largest mean KL divergence (nats) from the merged model, by llama.cpp's type, unless [gguf.max_mean_kl] sets one:
# docs/fidelity.md. The types are LLAMA_FTYPE of llama.h without NVFP4, which the quantizer does not make.
GGUF_TYPES = {
    "f32": 1e-4, "f16": 1e-4, "bf16": 1e-3,
    "q8_0": 1e-2, "q6_k": 2e-2,
    "q5_k_m": 4e-2, "q5_k_s": 4e-2, "q5_1": 4e-2, "q5_0": 4e-2,
    "q4_k_m": 1e-1, "q4_k_s": 1e-1, "q4_1": 1e-1, "q4_0": 1e-1, "iq4_nl": 1e-1, "iq4_xs": 1e-1, "mxfp4_moe": 1e-1,
    "q3_k_l": 3e-1, "q3_k_m": 3e-1, "q3_k_s": 3e-1, "iq3_m": 3e-1, "iq3_s": 3e-1, "iq3_xs": 3e-1, "iq3_xxs": 3e-1,
    "q2_k": 1.0, "q2_k_s": 1.0, "q2_0": 1.0, "iq2_m": 1.0, "iq2_s": 1.0, "iq2_xs": 1.0, "iq2_xxs": 1.0, "tq2_0": 1.0,
    "iq1_m": 2.0, "iq1_s": 2.0, "q1_0": 2.0, "tq1_0": 2.0,
}  # fmt: skip
# llama.cpp refuses to make these without an importance matrix.
NEED_IMPORTANCE = ("iq3_xs", "iq3_xxs", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")
