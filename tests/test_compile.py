"""How often --compile True compiles, and that it does so whole: counted by a back end that runs graphs as they are."""

import functools

import pytest
import torch as th
from conftest import TINY

import image_sample
import image_train
from guided_diffusion import checkpoint
from guided_diffusion.script_util import args_to_dict, create_model_and_diffusion, model_and_diffusion_defaults


@pytest.fixture
def compiled(monkeypatch):
    """What has been compiled since a model was placed, each a whole graph: a break is an error."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile(function):
        graphs.clear()  # of what check_compiler tried
        return whole(function)

    whole = functools.partial(th.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(th, "compile", compile)
    th._dynamo.reset()
    yield graphs
    th._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--use_checkpoint True --dropout 0.1", "--precision bf16 --microbatch 2"])
def test_training_compiles_encoder_and_decoder_once(data_dir, logdir, compiled, flags):
    """Whatever validation and previews, of other batches and without gradients, compute in between."""
    steps = "--batch_size 4 --max_steps 3 --val_split test --val_interval 2 --save_interval 2 --preview_samples 1"
    image_train.main(
        [*TINY, "--data_dir", str(data_dir), "--compile", "True", "--drop_rate", "0.5", *steps.split(), *flags.split()]
    )
    assert len(list((logdir / "previews").iterdir())) == 4
    assert len(compiled) == 2


@pytest.mark.slow
def test_sampling_compiles_for_whole_batches_and_for_others(data_dir, tmp_path, compiled):
    """At any scale: the encoder once, the decoder for the condition and the null one; once more each for the rest."""
    model, _ = create_model_and_diffusion(
        **args_to_dict(image_sample.create_argparser().parse_args(TINY), model_and_diffusion_defaults())
    )
    checkpoint.save(model.state_dict(), str(tmp_path), "model000001.pt")
    paths = ["--data_dir", str(data_dir), "--model_path", str(tmp_path / "model000001.pt"), "--use_train", "True"]
    flags = "--compile True --timestep_respacing 3 --batch_size 4 --s 1,1.5,2 --num_samples 11"
    image_sample.main([*TINY, *paths, "--results_path", str(tmp_path / "out"), *flags.split()])
    assert len(compiled) == 3 + 2
