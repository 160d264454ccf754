"""CUDA graphs: after one call on a device, a call of another shape that needs the same kernels can be
captured."""

import subprocess
import sys
from pathlib import Path

# The program runs in a process of its own, so that nothing has loaded kernels before.
PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import torch, flash_kda
from problems import make, to_torch

def arguments(**options):
    return to_torch(make(**options), "cuda")

flash_kda.fwd(**arguments(T=20, H=140))  # more heads than a GPU has SMs: solo CTAs
shapes = [dict(T=33, H=heads) for heads in (2, 40)]  # few heads: other kernels
shapes += [dict(lengths=[33, 0, 40, 9], H=70)]  # more heads of sequences than CTAs, which may share them out
for shape in shapes:
    a = arguments(**shape)
    want = {{n: torch.empty_like(a[n]) for n in ("out", "final_state")}}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flash_kda.fwd(**a)
    flash_kda.fwd(**{{**a, **want}})
    for replay in range(2):  # the second replay finds what the first one left in the workspace
        a["out"].fill_(torch.nan), a["final_state"].fill_(torch.nan)
        graph.replay()
        assert torch.equal(a["out"], want["out"]) and torch.equal(a["final_state"], want["final_state"])
print("captured")
"""


def test_another_shape_after_one_call(cuda):
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "captured", run.stderr
