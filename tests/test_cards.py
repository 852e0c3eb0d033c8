"""Cards say the facts that they are given, and nothing that a user wrote acts as Markdown."""

import re

from guided_diffusion import cards
from guided_diffusion.trained_flags import MODEL_FIELDS

DATA = {"patches": 24, "slides": 3, "unlabelled": 5, "held_out_patches": 8, "held_out_slides": 1}


def table(text):
    """What a card's table says."""
    return dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", text, re.M))


def test_a_model_card_says_what_is_known():
    config = {"data_dir": "/home/someone/MoNuSeg", "data_licence": "CC BY 4.0", "init_checkpoint": "/x/ema_040000.pt"}
    config |= {"lr": 1e-4, "use_hv_map": True, "num_workers": 7, "precision": ""}
    text = cards.model_card(config, DATA, 5000, {"step": 4000, "val_loss": 0.25})
    assert table(text) == {
        "data": "MoNuSeg, licence: CC BY 4.0",
        "trained on": "24 patches of 3 slides, and 5 images without masks",
        "validated on": "8 patches of 1 slides that it does not learn from",
        "begun with": "ema_040000.pt",
        "steps": "5000",
        "lowest validation loss": "0.25, at step 4000",
    }
    assert "--use_hv_map True --lr 0.0001\n" in text and "/home" not in text
    for word in ("Not for diagnosis", "JPEG", "Kumar", "2207.00050"):
        assert word in text


def test_a_model_card_says_what_its_weights_depend_on():
    # But for what is what it is in all models here.
    same = {"in_channels", "num_heads", "num_heads_upsample", "use_new_attention_order", "rescale_timesteps"}
    assert set(MODEL_FIELDS) - set(cards.TOLD) == same


def test_a_model_card_says_what_is_not_known():
    text = cards.model_card({"data_dir": "DATA/"}, {**DATA, "held_out_patches": 0, "unlabelled": 0}, 0, {})
    told = table(text)
    assert told["data"] == "DATA, licence: unknown" and told["validated on"] == "nothing"
    assert told["begun with"] == "random weights" and told["lowest validation loss"] == "not measured yet"


def test_what_a_user_writes_does_not_act():
    assert cards.one_line("a\n| b |\x1b[31m <img src=x> [c](d) `e`") == (
        r"a \| b \| \[31m \<img src=x\> \[c\](d) \`e\`"
    )
    text = cards.data_sheet({"size": "32 x 32 px\n# no"}, ["CC0", "my | own"])
    assert "\n# no" not in text
    assert table(text.replace(r"\|", "/")) == {
        "size": r"32 x 32 px \# no",
        "licence of the models' data": "CC0; my / own",
    }
