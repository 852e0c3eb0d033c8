"""What a configuration says: cells and variants, what these wait for and how many patches they take."""

import pytest

from guided_diffusion.histology.experiment import protocol

ROWS = [
    "real:",
    "jitter: jitter",
    "ratio1: ratio=1 jitter",
    "ratio5: structures=both ratio=5 jitter",
    "filtered: structures=both ratio=2 filter=patchcore jitter",
    "useful: structures=both ratio=2 filter=useful judge=jitter bounds=0.1,0.6 jitter",
    "random: structures=both size=useful jitter",
    "first: structures=recombine first=0.5",
    "pseudo: source=pseudo ratio=all jitter",
    "transfer: source=transfer ratio=2 jitter",
    "unseen: source=unseen ratio=2 jitter",
    "layouts: structures=unseen ratio=2 jitter",
]
VARIANTS = protocol.parse_variants(ROWS)


def test_what_variants_take():
    assert {name: variant.kinds for name, variant in VARIANTS.items()} == {
        "real": (),
        "jitter": (),
        "ratio1": ("samples",),
        **dict.fromkeys(("ratio5", "filtered", "useful", "random"), ("samples", "made")),
        "first": ("made",),
        "pseudo": ("pseudo-jitter",),
        "transfer": ("transfer",),
        "unseen": ("unseen",),
        "layouts": ("layouts",),
    }
    chosen = {name: variant.choice for name, variant in VARIANTS.items() if variant.choice}
    assert chosen == {"filtered": "patchcore-both", "useful": "useful-both-jitter-0.1-0.6"}
    assert [name for name, variant in VARIANTS.items() if variant.needs_others] == [
        *("pseudo", "transfer", "unseen", "layouts"),
    ]
    assert protocol.baselines(VARIANTS.values()) == ["jitter", "real"]
    titles = [variant.title for variant in VARIANTS.values()]
    assert len({*titles}) == len(titles)
    assert titles[4] == "real + 2 synthetic, real and made layouts, filtered, jitter"
    assert [v.name for v in protocol.involved(["random"], VARIANTS)] == ["jitter", "useful", "random"]


def test_how_many_patches_are_made():
    names = ("ratio1", "filtered", "random", "pseudo", "transfer", "first")
    wanted = [VARIANTS[name] for name in names]
    found = protocol.amounts(wanted, VARIANTS, patches=33, others=50)
    # Of two for each, half are of either kind, and a variant of one kind alone takes 33.
    assert found == {"samples": 33, "made": 33, "pseudo-jitter": 50, "transfer": 66}
    assert protocol.amounts([VARIANTS["ratio5"], VARIANTS["ratio1"]], VARIANTS, 33, 0) == {"samples": 83, "made": 83}
    assert protocol.amounts([VARIANTS["unseen"]], VARIANTS, 33, 50) == {"unseen": 50}


def test_a_grid_is_cells():
    cells = protocol.parse_grid(
        ["masks 10 0-2,4 all", "slides 100 0 real", "patches 2.5 7 unseen", "slides 100 0 real,jitter"], VARIANTS
    )
    assert list(cells) == [*(f"masks-f10-s{seed}" for seed in (0, 1, 2, 4)), "slides-f100-s0", "patches-f2.5-s7"]
    assert cells["masks-f10-s4"] == protocol.Cell("masks", 10, 4, tuple(VARIANTS))
    assert cells["slides-f100-s0"].variants == ("real", "jitter")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("more", "'more' is no NAME: WORD"),
        ("real: jitter", "'real: jitter' is no NAME: WORD ..., or the second"),
        ("A: jitter", "'A: jitter' is no NAME"),
        ("a: bright", "a: 'bright' is no word"),
        ("a: jitter=1", "a: 'jitter=1' is no word"),
        ("a: ratio=0", "a: ratio=0 is not a number"),
        ("a: ratio=all", "ratio=all is for source=pseudo"),
        ("a: first=1", "first=1 is not a number"),
        ("a: filter=useful judge=b bounds=0.7,0.2", "bounds=0.7,0.2 are no LOW,HIGH"),
        ("a: filter=useful judge=b bounds=a;b", "bounds=a;b are no LOW,HIGH"),
        ("a: ratio=1 bounds=0,1", "bounds are of filter=useful alone"),
        ("a: first=0.5 last=0.2 ratio=1", "give one of them"),
        ("a: source=gan", "source=gan: choose one of model, pseudo, transfer, unseen"),
        ("a: structures=any", "structures=any: choose one of real,"),
        ("a: filter=any", "filter=any: choose one of patchcore, useful"),
        ("a: source=pseudo filter=patchcore", "source=pseudo has no structures and no filter"),
        ("a: ratio=2 size=ratio1", "size and ratio both say"),
        ("a: filter=useful", "filter=useful and source=pseudo take a judge"),
        ("a: ratio=1 judge=jitter", "and nothing else does"),
        ("a: filter=useful judge=pseudo", "a: judge=pseudo is no variant that can be that"),
        ("a: size=random", "a: size=random is no variant"),
        ("a: size=real", "a: size=real is no variant"),
    ],
)
def test_variants_that_are_none(row, message):
    with pytest.raises(ValueError, match=f"VARIANTS: .*{message}"):
        protocol.parse_variants([*ROWS, row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("masks 10 0", "is no TRACK SHARE SEEDS VARIANTS"),
        ("clouds 10 0 all", "is no TRACK"),
        ("masks 10 0- all", "is no TRACK"),
        ("masks 101 0 real", "share=101 is not a number"),
        ("masks 0 0 real", "share=0 is not a number"),
        ("masks 10 0 real,gan", "gan is not of VARIANTS"),
        ("masks 100 0 all", "pseudo needs training slides beside the share's"),
    ],
)
def test_rows_of_the_grid_that_are_none(row, message):
    with pytest.raises(ValueError, match=f"GRID: .*{message}|{message}"):
        protocol.parse_grid(["masks 5 0 all", row], VARIANTS)
