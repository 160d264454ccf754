"""Kimi Delta Attention in ten lines, on a GPU if there is one: python examples/quickstart.py"""

import torch

import flash_kda

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, D = 1, 1024, 4, 128
q, k, v, g = torch.randn(4, B, T, H, D).bfloat16().to(device)
beta = torch.randn(B, T, H).bfloat16().to(device)
A_log, dt_bias = torch.zeros(H, device=device), torch.zeros(H, D, device=device)
out, state = torch.empty_like(v), torch.empty(B, H, D, D, device=device)
flash_kda.fwd(q, k, v, g, beta, D**-0.5, out, A_log, dt_bias, -5.0, final_state=state)
print(f"out {tuple(out.shape)}, norm {out.float().norm():.2f}; norm of the final state {state.norm():.2f}")
