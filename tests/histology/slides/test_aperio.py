"""Aperio XML to instance maps: the rasteriser's rules pixel by pixel, and what is no usable XML."""

import numpy as np
import pytest

from guided_diffusion.histology.slides import aperio

SQUARE = [(3, 3), (8, 3), (8, 8), (3, 8)]


def region(points, attributes=""):
    vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in points)
    return f"<Region {attributes}><Vertices>{vertices}</Vertices></Region>"


def xml(*regions):
    return f"<Annotations><Annotation><Regions>{''.join(regions)}</Regions></Annotation></Annotations>"


@pytest.fixture
def inst_map_of(tmp_path):
    """Writes regions to a file and reads them back as a map."""

    def draw(*regions, height=20, width=20):
        path = tmp_path / "a.xml"
        path.write_text(xml(*regions))
        return aperio.rasterise(aperio.read_polygons(path), height, width)

    return draw


def test_square_includes_its_border(inst_map_of):
    inst_map = inst_map_of(region(SQUARE))
    assert inst_map.dtype == np.int32
    assert inst_map.sum() == 36
    assert inst_map[3:9, 3:9].all()


def test_x_is_the_column(inst_map_of):
    inst_map = inst_map_of(region([(1, 10), (4, 10), (4, 15), (1, 15)]), height=20, width=12)
    assert inst_map.shape == (20, 12)
    assert inst_map[10:16, 1:5].sum() == inst_map.sum() == 24


def test_coordinates_are_truncated_toward_zero(inst_map_of):
    assert np.argwhere(inst_map_of(region([(3.9, 5.99)]))).tolist() == [[5, 3]]
    assert np.argwhere(inst_map_of(region([(-0.9, -0.1)]))).tolist() == [[0, 0]]
    assert np.array_equal(inst_map_of(region([(x + 0.99, y + 0.5) for x, y in SQUARE])), inst_map_of(region(SQUARE)))


def test_two_vertices_are_a_line(inst_map_of):
    assert np.argwhere(inst_map_of(region([(2, 2), (5, 5)]))).tolist() == [[2, 2], [3, 3], [4, 4], [5, 5]]


def test_a_loop_within_a_loop_is_a_hole(inst_map_of):
    outer = [(0, 0), (18, 0), (18, 18), (0, 18), (0, 0)]
    inner = [(5, 5), (12, 5), (12, 12), (5, 12), (5, 5)]
    inst_map = inst_map_of(region(outer + inner))
    assert inst_map[8, 8] == 0 and inst_map[6:12, 6:12].sum() == 0
    assert inst_map[2, 15] == inst_map[15, 15] == inst_map[5, 8] == 1


def test_what_lies_outside_is_cut_off(inst_map_of):
    inst_map = inst_map_of(region([(-5, -5), (4, -5), (4, 4), (-5, 4)]), region([(15, 15), (10**9, 15), (15, 10**9)]))
    assert (inst_map == 1).sum() == 25 and inst_map[:5, :5].all()
    assert (inst_map[15:, 15:] == 2).all() and (inst_map == 2).sum() == 25


def test_later_regions_overwrite_and_ids_are_positions(inst_map_of):
    shifted = [(x + 2, y) for x, y in SQUARE]
    inst_map = inst_map_of(region(SQUARE, 'Id="77"'), region([]), region(shifted, 'Id="5" NegativeROA="1"'))
    assert np.unique(inst_map).tolist() == [0, 1, 3]
    assert (inst_map == 1).sum() == 12 and (inst_map == 3).sum() == 36


def test_all_layers_count_in_document_order(tmp_path):
    path = tmp_path / "a.xml"
    one, two = region([(1, 1)]), region([(2, 2)])
    path.write_text(
        f"<Annotations><Annotation Id='9'><Regions>{two}</Regions></Annotation>"
        f"<Annotation Id='1'><Regions>{one}</Regions></Annotation></Annotations>"
    )
    assert [polygon.tolist() for polygon in aperio.read_polygons(path)] == [[[2, 2]], [[1, 1]]]


def test_a_namespace_does_not_hide_regions(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(xml(region(SQUARE)).replace("<Annotations>", "<Annotations xmlns='http://aperio.example'>"))
    assert len(aperio.read_polygons(path)[0]) == 4


def test_ids_above_sixteen_bits_survive():
    polygons = [np.zeros((0, 2), np.int32)] * 69_999 + [np.array(SQUARE, np.int32)]
    assert np.unique(aperio.rasterise(polygons, 10, 10)).tolist() == [0, 70_000]


def test_filling_agrees_with_point_in_polygon(inst_map_of):
    """A pixel strictly inside (even-odd ray casting) is filled; one farther than a pixel outside is not."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :40]
    for _ in range(20):
        points = rng.integers(-5, 45, (rng.integers(3, 9), 2)).astype(float)
        inside = np.zeros((40, 40), bool)
        near = np.zeros((40, 40), bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
            span = (y0 > rows) != (y1 > rows)
            with np.errstate(divide="ignore", invalid="ignore"):
                inside ^= span & (columns < (x1 - x0) * (rows - y0) / (y1 - y0) + x0)
            length = max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-9)
            t = np.clip(((columns - x0) * (x1 - x0) + (rows - y0) * (y1 - y0)) / length, 0, 1)
            near |= np.hypot(columns - x0 - t * (x1 - x0), rows - y0 - t * (y1 - y0)) <= 1
        filled = inst_map_of(region(points.astype(int)), height=40, width=40) > 0
        assert (filled == inside)[~near].all()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not a usable Aperio XML"),
        ("<Annotations><Region>", "not a usable Aperio XML"),
        ("no xml at all", "not a usable Aperio XML"),
        ("<?xml version='1.0' encoding='nonsense'?><a/>", "not a usable Aperio XML"),
        ("<Annotations/>", "no Region"),
        (f"<!DOCTYPE a>{xml(region(SQUARE))}", "document type"),
        (f'<!DOCTYPE a [<!ENTITY x "y">]>{xml(region(SQUARE))}', "document type"),
        (f'<!ENTITY x "y">{xml(region(SQUARE))}', "not a usable Aperio XML"),
        (xml('<Region><Vertex X="1"/></Region>'), "has no Y"),
        (xml('<Region><Vertex X="1" Y="two"/></Region>'), "two"),
        (xml(region([("nan", 1)])), "no pixel position"),
        (xml(region([(1e300, 1)])), "no pixel position"),
    ],
)
def test_a_bad_xml_is_named(tmp_path, text, what):
    path = tmp_path / "slide.xml"
    path.write_text(text)
    with pytest.raises(ValueError, match=what) as caught:
        aperio.read_polygons(path)
    assert "slide.xml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<Annotations MicronsPerPixel="0.252700"><Annotation/></Annotations>', 0.2527),
        ('<?xml version="1.0"?>\n<x:A xmlns:x="u" MicronsPerPixel="0.5">' + "<Region/>" * 900 + "</x:A>", 0.5),
        ('<A><B MicronsPerPixel="0.5"/></A>', None),
        ('<A MicronsPerPixel="0"/>', None),
        ('<A MicronsPerPixel="nan"/>', None),
        ('<A MicronsPerPixel=""/>', None),
        ('<!DOCTYPE A [<!ENTITY x "0.5">]><A MicronsPerPixel="&x;"/>', None),
        ("no xml", None),
        ("", None),
    ],
)
def test_micrometres_a_pixel_are_read(tmp_path, text, found):
    path = tmp_path / "s.xml"
    path.write_text(text)
    assert aperio.read_mpp(path) == found


def test_a_document_type_in_utf16_is_refused(tmp_path):
    path = tmp_path / "slide.xml"
    path.write_bytes(f"<?xml version='1.0' encoding='utf-16'?><!DOCTYPE a>{xml(region(SQUARE))}".encode("utf-16"))
    with pytest.raises(ValueError, match="document type"):
        aperio.read_polygons(path)


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_region_around_the_others_is_found(place):
    nuclei = [np.array(SQUARE) + 10 * k for k in range(4)] + [np.zeros((0, 2), int)]
    frame = np.array([(0, 0), (25, 0), (25, 25), (0, 25)])  # two of four lie inside: no more than half
    around = [frame if k == 2 else 4 * frame if k == 1 else nuclei[0] for k in range(3)]
    for number, region_around in enumerate(around):
        polygons = [p.astype(np.int32) for p in (*nuclei[:place], region_around, *nuclei[place:])]
        assert aperio.frame_among(polygons) == ((place + 1, 4) if number == 1 else None)
    assert aperio.frame_among([]) is None
    bent = np.array([(0, 0), (99, 0), (99, 99), (98, 99), (98, 1), (0, 1)], np.int32)  # its box alone holds them
    assert aperio.frame_among([bent, *(n.astype(np.int32) for n in nuclei[:4])]) is None
