"""A network of a class of its own on the Hub: its code goes up with it, and comes down by trust or not at all."""

import subprocess
from pathlib import Path

import fork_server
import pytest
from local_hub import LocalHub

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
# In a process of its own, since the Hub's client reads its address when it is imported.
CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from custom_nets import OwnNet
from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler

pipe = DDPMPaperPipeline(OwnNet(), DDPMPaperScheduler())
pipe.push_to_hub("tester/own")
try:
    DDPMPaperPipeline.from_pretrained("tester/own")
except ValueError as error:
    print(error)
given = OwnNet.from_pretrained("tester/own", subfolder="unet")
x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
for options in ({"trust_remote_code": True}, {"unet": given}):
    loaded = DDPMPaperPipeline.from_pretrained("tester/own", **options)
    torch.testing.assert_close(loaded.unet.eval()(x, t).sample, pipe.unet.eval()(x, t).sample)
    print(type(loaded.unet).__module__.rpartition(".")[2])
"""


def test_own_networks_go_to_the_hub_and_back(tmp_path):
    with LocalHub() as server:
        words = ["-c", CODE, str(ROOT / "tests")]
        done: subprocess.CompletedProcess = fork_server.run(
            words, cwd=ROOT, env=server.client(tmp_path, "hf_x"), capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    refusal, *modules = done.stdout.splitlines()
    assert "trust_remote_code=True, which runs unet/own_custom_nets.py" in refusal
    assert modules == ["own_custom_nets", "custom_nets"]
