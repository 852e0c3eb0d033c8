"""Lengths and areas by micrometres a pixel."""

import pytest

from guided_diffusion import magnification


def test_at_40x_all_stays_as_it_is():
    for pixels in (1, 3, 5, 13, 20, 30, 50):
        assert magnification.length(pixels, 0.25) == magnification.area(pixels, 0.25) == pixels
    assert [magnification.odd_length(side, 0.25) for side in (3, 5, 13)] == [3, 5, 13]


def test_at_20x_lengths_are_half_and_areas_a_quarter():
    assert magnification.length(13, 0.5) == 6.5 and magnification.area(30, 0.5) == 7.5
    assert [magnification.odd_length(13, mpp) for mpp in (0.5, 1.0, 10.0, 0.125)] == [7, 3, 3, 27]


@pytest.mark.parametrize(
    ("mpp", "found"),
    [(0.2456, 0.25), (0.2527, 0.25), (0.504, 0.5), (0.99, 1), (0.125, 0.125), (0.35, 0.35), (0.2, 0.2)],
)
def test_scanners_of_one_magnification_differ_a_little(mpp, found):
    assert magnification.nominal(mpp) == found
    assert magnification.alike(mpp, found) and not magnification.alike(mpp, 1.3 * found)


def test_a_data_folder_says_its_own(tmp_path):
    patches = tmp_path / "DATA" / "clusters" / "0" / "10ss"
    patches.mkdir(parents=True)
    assert magnification.of_data(patches) is None and magnification.of_data("") is None
    manifest = tmp_path / "DATA" / "prepare.json"
    for text, mpp in (('{"mpp": 0.5, "complete": true}', 0.5), ("{}", None)):
        manifest.write_text(text)
        assert magnification.of_data(patches) == mpp
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / "prepare.json").unlink(missing_ok=True)
        magnification.pass_on(patches, tmp_path / "made")
        assert magnification.of_data(tmp_path / "made") == mpp
    for text in ("{", "[1]", '{"mpp": "x"}', '{"mpp": 0}', '{"mpp": -1}'):
        manifest.write_text(text)
        with pytest.raises(ValueError, match="prepare.json"):
            magnification.of_data(patches)


def test_a_model_of_another_magnification_is_told(tmp_path):
    (tmp_path / "prepare.json").write_text('{"mpp": 0.5}')
    assert magnification.mismatch("M", 0.5, tmp_path) == "" == magnification.mismatch("M", 0.25, tmp_path / "../none")
    assert "M was trained at 0.25 um a pixel" in magnification.mismatch("M", 0.25, tmp_path)
