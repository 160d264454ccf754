"""Calls of SGLang's kernel classes with tensors as SGLang 0.5.23 builds them, and what they must give."""

import torch

import flash_kda

DIM = 128
OUT, STATE = 2.2e-3, 1e-5  # the largest relative errors of out and of fp32 states on the CPU
OUT_GPU, STATE_GPU = 5.6e-3, 4.8e-3


def error(got, want):
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    norm = want.norm()
    return float((got - want).norm() / norm) if norm else float(got.norm())


def pool_of(slots, heads, dtype, device, seed=1):
    """Of states, between whose slots other data of a page lies."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randn(slots, heads * DIM * DIM + 64, generator=generator).to(device, dtype)
    return pages[:, 32 : 32 + heads * DIM * DIM].view(slots, heads, DIM, DIM)


class Batch:
    """Tokens of some sequences: slices of the convolution's output, raw gate and raw beta, the columns of a
    projection. tail: tokens behind the last sequence, which the padding of a CUDA graph has."""

    def __init__(
        self, lengths, heads=2, slots=None, gate="bounded", dtype=torch.float32, device="cpu", tail=0
    ):
        generator = torch.Generator().manual_seed(len(lengths) + sum(lengths))

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.lengths, self.heads, self.device = lengths, heads, device
        tokens = sum(lengths) + tail
        self.tokens = tokens
        self.mixed_qkv = normal(tokens, 3 * heads * DIM).to(device, torch.bfloat16)
        self.q, self.k, self.v = (
            x.unflatten(-1, (-1, DIM)).unsqueeze(0) for x in self.mixed_qkv.split(heads * DIM, -1)
        )
        projection = normal(tokens, heads + 7).to(device, torch.bfloat16)
        self.beta = projection[:, 3 : 3 + heads].unsqueeze(0)
        self.flat_gate = normal(tokens, heads * DIM).to(device, torch.bfloat16)
        self.gate = self.flat_gate.unflatten(-1, (-1, DIM)).unsqueeze(0)
        self.A_log = torch.nn.Parameter(torch.rand(1, 1, heads, 1, generator=generator).to(device))
        self.dt_bias = torch.nn.Parameter((normal(heads * DIM) - 2).to(device))
        self.lower_bound = {"bounded": -5.0, "softplus": None}[gate]
        self.pool = pool_of(len(lengths) + 4, heads, dtype, device)
        slots = list(range(3, 3 + len(lengths))) if slots is None else slots
        self.cache_indices = torch.tensor(slots, dtype=torch.int32, device=device)
        starts = torch.tensor([0, *lengths]).cumsum(0)
        self.query_start_loc = starts.to(device, torch.int32)

    def states(self):
        return {
            "ssm_states": self.pool,
            "cache_indices": self.cache_indices,
            "query_start_loc": self.query_start_loc,
        }

    def of_gate(self):
        return {"A_log": self.A_log, "dt_bias": self.dt_bias, "lower_bound": self.lower_bound}

    def prompt(self):
        """The arguments of extend, as the backend passes them."""
        return {
            "q": self.q, "k": self.k, "v": self.v, "g": self.gate, "beta": self.beta, **self.states(),
            **self.of_gate(), "beta_is_raw": True, "extend_seq_lens_cpu": list(self.lengths),
            "extend_prefix_lens": torch.ones(len(self.lengths), dtype=torch.int32), "layer_id": 0,
            "is_spec_decode": False, "return_intermediate_states": False, "track_ssm_h_src": None,
            "track_state": None, "track_chunk_idx": None, "state_checkpoint_cu_starts": None,
            "num_state_checkpoints": 0, "state_checkpoint_every_n_tokens": 0,
            "state_checkpoint_indices": None, "track_ssm_h_batch_src": None,
        }  # fmt: skip

    def right(self, **options):
        """out of all tokens of sequences, and the state of each sequence, in fp64. Of the pool as it is."""
        total = sum(self.lengths)
        cpu = {
            name: x[:, :total].cpu()
            for name, x in zip("qkvgb", (self.q, self.k, self.v, self.gate, self.beta))
        }
        return flash_kda.reference(
            *cpu.values(), DIM**-0.5, self.A_log.detach().cpu(), self.dt_bias.detach().cpu(),
            self.lower_bound, self.pool.cpu(), self.query_start_loc.cpu(),
            state_indices=self.cache_indices.cpu(), **options,
        )  # fmt: skip

    def right_drafts(self, drafts, parents=None):
        """out and states of draft tokens [N, drafts] in fp64, from the states of the pool as it is."""
        N = len(self.lengths)
        cpu = [
            x[0, : N * drafts].cpu().unflatten(0, (N, drafts))
            for x in (self.q, self.k, self.v, self.gate, self.beta)
        ]
        return flash_kda.decode_reference(
            *cpu, DIM**-0.5, self.A_log.detach().cpu(), self.dt_bias.detach().cpu(), self.lower_bound,
            self.pool.cpu(), state_indices=self.cache_indices.cpu(), write_states="none", parents=parents,
        )  # fmt: skip


def hold_extend(batch, before, out, right):
    """out and the pool of an extend, whose pool was `before`."""
    bars = (OUT, STATE) if batch.device == "cpu" else (OUT_GPU, STATE_GPU)
    want, states = right[:2]
    assert out.shape == batch.v.shape
    assert error(out[:, : sum(batch.lengths)], want) <= bars[0]
    bar = max(bars[1], 2.2e-3 if batch.pool.dtype == torch.bfloat16 else 0)
    written = [slot for slot in batch.cache_indices.tolist() if slot >= 0]
    for n, slot in enumerate(batch.cache_indices.tolist()):
        if slot >= 0:
            assert error(batch.pool[slot], states[n]) <= bar
    for slot in set(range(len(before))) - set(written):
        assert torch.equal(batch.pool[slot], before[slot]), f"slot {slot} was touched"
