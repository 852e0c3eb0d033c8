"""What is kept of conditions: as much as there is room for, and samples are the same with and without."""

import itertools
import os

import pytest
import torch as th

from guided_diffusion import condition_cache
from guided_diffusion.condition_cache import ConditionCache
from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.sampling_plan import SamplingPlan
from guided_diffusion.script_util import create_gaussian_diffusion, create_model

SPEC = ConditionSpec(use_hv_map=True, num_classes=3)
PLAN = SamplingPlan("ddim", create_gaussian_diffusion(predict_xstart=True, timestep_respacing="2"), s=1.5)


@pytest.fixture(scope="module")
def model():
    """A tiny model whose output depends on the condition."""
    with th.random.fork_rng():
        th.manual_seed(0)
        net = create_model(16, 32, 1, "1,1", attention_resolutions="8", num_classes=3)
        for p in net.parameters():
            p.data.add_(0.05 * th.randn(p.shape))
    return net.eval()


@pytest.mark.parametrize("keep_colour", [False, True])
def test_windows_are_kept_as_far_as_there_is_room(model, monkeypatch, keep_colour):
    """Six batches of windows, of which two fit; each of these is convolved once for all steps and scales."""
    ys = [th.randn(1, 3, *shape, generator=th.Generator().manual_seed(1)) for shape in ((24, 24), (16, 20), (16, 48))]
    each = model.modulation_bytes(16) * (1 + keep_colour)
    monkeypatch.setattr(condition_cache, "free_memory", lambda device: 2 * (2 * 2 * each + each // 2))
    convolved = []
    shown = ConditionCache._shown
    watch = lambda model, y, keep: convolved.append(keep) or shown(model, y, keep)  # noqa: E731
    monkeypatch.setattr(ConditionCache, "_shown", staticmethod(watch))
    made = {}
    for mode in ("auto", "on", "off"):
        cache = ConditionCache(model, SPEC, th.device("cpu"), batch_size=2, mode=mode, keep_colour=keep_colour)
        convolved.clear()
        sample = cache.fields(ys, 0.5)
        made[mode] = [sample(PLAN, [0, 1, 2], False) for _ in range(2)]
        kept = {"auto": 2, "on": 6, "off": 0}[mode]
        assert convolved.count(True) == kept * (1 + keep_colour)
        assert convolved.count(False) == (6 - kept) * (1 + keep_colour) * 2 * 2
    for one, *others in zip(*itertools.chain(*made.values())):
        assert one.abs().max() > 0.1
        for other in others:
            th.testing.assert_close(other, one, rtol=0, atol=1e-6)


def test_memory_that_files_hold_is_free_and_a_containers_limit_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(condition_cache, "GROUP", tmp_path)
    cpu = th.device("cpu")
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < condition_cache.free_memory(cpu) <= everything
    assert condition_cache._number("/proc/meminfo", "MemAvailable:") > 0
    for limit in (str(2**20), "max"):
        for name, text in (("max", limit), ("current", str(2**19)), ("stat", "anon 7\ninactive_file 1024\n")):
            (tmp_path / f"memory.{name}").write_text(f"{text}\n")
        free = condition_cache.free_memory(cpu)
        assert free > 2**20 if limit == "max" else free == 2**20 - 2**19 + 2**10


def test_what_does_not_fit_is_said(model, monkeypatch, capsys):
    monkeypatch.setattr(condition_cache, "free_memory", lambda device: model.modulation_bytes(16))
    cache = ConditionCache(model, SPEC, th.device("cpu"), batch_size=4)
    assert not cache.on and "--spade_cache auto: off, since it would take" in capsys.readouterr().out
