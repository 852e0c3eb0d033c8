"""Clusters of planted blobs, labels of new points, and the seeded cascade of subsets."""

import functools
import sys
from collections import Counter

import numpy as np
import pytest

from guided_diffusion.histology.features import clustering
from guided_diffusion.histology.features.clustering import NOISE, Options, best_of, fit, silhouette, subset_cascade

CENTRES = np.array([[0, 0, 0], [10, 0, 0], [0, 10, 5]])


def blobs(count=60, seed=0, dimensions=3):
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(3), count)
    return (CENTRES[of] @ np.eye(3, dimensions) + rng.normal(size=(3 * count, dimensions))).astype(np.float32), of


def same_partition(labels, of):
    return len(set(zip(labels, of))) == len(set(labels)) == len(set(of))


@pytest.mark.parametrize("cluster", ["hdbscan", "kmeans", "gmm"])
@pytest.mark.parametrize("reduce", ["pca", "none"])
def test_finds_planted_blobs(reduce, cluster):
    options = Options(reduce, cluster, n_components=3, n_clusters=3, min_samples=3, min_cluster_size=20)
    train, of = blobs(dimensions=8)
    found = fit(train, CENTRES @ np.eye(3, 8), options, seed=1)
    kept = np.array(found.train_labels) != NOISE
    assert kept.mean() > 0.95 and same_partition(np.array(found.train_labels)[kept], of[kept])
    names = [found.train_labels[np.flatnonzero(kept & (of == k))[0]] for k in range(3)]
    assert found.test_labels == names and found.silhouette > 0.5
    assert found.train.shape == (180, 8 if reduce == "none" else 3)


@pytest.fixture
def short_umap(monkeypatch) -> None:
    """UMAP as Python interprets it, for few rounds: to compile it takes a minute, and changes no number that counts."""
    numba = pytest.importorskip("numba")
    with monkeypatch.context() as while_it_is_imported:
        while_it_is_imported.setattr(numba.config, "DISABLE_JIT", 1)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("umap", "pynndescent")]:
            while_it_is_imported.delitem(sys.modules, name)
        pytest.importorskip("umap")
        umap = clustering.import_umap()
        monkeypatch.setattr(clustering, "import_umap", lambda: functools.partial(umap, n_epochs=20))
        yield
        for name in [name for name in sys.modules if name.partition(".")[0] in ("umap", "pynndescent")]:
            del sys.modules[name]


def test_umap_is_seeded_and_assigns_test_points(short_umap):
    train, of = blobs(15, dimensions=8)
    options = Options("umap", "hdbscan", 2, min_samples=3, min_cluster_size=6)
    one, two = (fit(train, train[::5], options, seed=5) for _ in range(2))
    assert np.array_equal(one.train, two.train) and np.array_equal(one.test, two.test)
    assert one.train_labels == two.train_labels and one.test_labels == two.test_labels
    assert same_partition(one.train_labels, of) and one.test_labels == one.train_labels[::5]


@pytest.mark.parametrize(
    "package, message",
    [("umap", "--reduce umap needs: pip install umap-learn"), ("hdbscan", "--cluster hdbscan needs: pip install")],
)
def test_missing_packages_are_named(package, message, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        fit(
            blobs()[0],
            blobs()[0][:0],
            Options("umap" if package == "umap" else "none", "hdbscan", min_cluster_size=10),
            0,
        )


def test_numba_without_a_folder_to_cache_in(tmp_path, monkeypatch):
    """As for another user than the one who installed the packages, and without a home."""
    import numba

    package = tmp_path / "umap"
    package.mkdir()
    (package / "__pycache__").touch()  # where a folder cannot be made
    (package / "__init__.py").write_text(
        "import numba\n\n@numba.njit(cache=True)\ndef one():\n    return 1\n\nclass UMAP:\n    one = one\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "umap", None)  # which is undone in the end, also where there was none
    del sys.modules["umap"]
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(package / "__init__.py" / "none"))
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "/dev/null")
    assert clustering.import_umap().one() == 1


def noisy_blobs():
    rng = np.random.default_rng(1)
    return np.concatenate([blobs(seed=4)[0], rng.uniform(-5, 15, (40, 3))]).astype(np.float64), rng


def test_new_points_get_the_labels_of_where_they_fall():
    train, rng = noisy_blobs()
    options = Options("none", "hdbscan", min_samples=4, min_cluster_size=15)
    found = fit(train, np.concatenate([CENTRES, rng.uniform(40, 50, (5, 3))]), options, 0)
    names = [Counter(found.train_labels[60 * k : 60 * k + 60]).most_common(1)[0][0] for k in range(3)]
    assert sorted(names) == ["0", "1", "2"] and found.test_labels == [*names, *[NOISE] * 5]
    own = fit(train, train, options, 0)
    assert [b for a, b in zip(own.train_labels, own.test_labels) if a != NOISE] == [
        label for label in own.train_labels if label != NOISE
    ]


@pytest.mark.filterwarnings("error")
def test_without_clusters_all_is_noise_and_without_points_there_are_no_labels():
    train = np.random.default_rng(0).uniform(size=(40, 3))
    found = fit(train, train[:2], Options("none", "hdbscan", min_samples=10, min_cluster_size=39), 0)
    assert found.train_labels == [NOISE] * 40 and found.test_labels == [NOISE] * 2
    assert (
        fit(blobs()[0], train[:0], Options("none", "hdbscan", min_samples=3, min_cluster_size=20), 0).test_labels == []
    )


def test_best_of_takes_the_best_silhouette():
    train = blobs(dimensions=8)[0]
    options = Options("none", "kmeans", n_clusters=7)
    seen = []
    best, trials = best_of(train, train[:0], options, range(3, 7), lambda: seen.append(1))
    assert [trial.seed for trial in trials] == [3, 4, 5, 6] and len(seen) == 4
    assert best.silhouette == max(trial.silhouette for trial in trials) and best.test_labels == []
    assert best.silhouette == silhouette(best.train, best.train_labels)


def test_silhouette_leaves_noise_out():
    points, of = blobs()
    labels = [str(k) for k in of]
    noisy = np.concatenate([points, np.random.default_rng(0).uniform(-5, 15, (20, 3))])
    assert silhouette(noisy, [*labels, *[NOISE] * 20]) == pytest.approx(silhouette(points, labels))
    assert silhouette(points, ["0"] * len(points)) is None
    assert silhouette(points, [NOISE] * len(points)) is None


@pytest.mark.parametrize(
    "options, n, message",
    [
        (dict(cluster="kmeans", n_clusters=50), 40, "--n_clusters 50 needs 50 training patches, there are 40"),
        (dict(cluster="gmm", n_clusters=50), 40, "--n_clusters 50"),
        (dict(min_cluster_size=50), 40, "--min_cluster_size 50 needs 50 training patches, there are 40"),
        (dict(min_cluster_size=5, min_samples=40), 40, "--min_samples 40 needs 41"),
        (dict(min_cluster_size=2, min_samples=1, n_components=3), 4, "--n_components 3 needs 5"),
        (dict(min_cluster_size=5, n_components=9), 40, "--n_components 9 is more than the 3"),
        (dict(reduce="none", min_cluster_size=39), 40, "finds no cluster among 40"),
    ],
)
def test_too_few_points(options, n, message):
    train = np.random.default_rng(0).normal(size=(n, 3))
    with pytest.raises(ValueError, match=message):
        best_of(train, train[:0], Options(**{"cluster": "hdbscan", **options}), [0])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(reduce="tsne"), "unknown --reduce 'tsne': choose one of pca, umap, none"),
        (dict(cluster="dbscan"), "unknown --cluster 'dbscan'"),
        (dict(n_clusters=1), "--n_clusters 1 must be at least 2"),
        (dict(n_components=0), "--n_components 0"),
        (dict(min_samples=0), "--min_samples 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_cascade_is_the_references():
    """70 -> 28, as its 05ss -> 02ss; each share lies in the one before and is the first of a legacy permutation."""
    shares = subset_cascade(1406, [25, 10, 5, 2], 42)
    assert [len(shares[p]) for p in (25, 10, 5, 2)] == [351, 140, 70, 28]
    assert np.array_equal(shares[25], np.sort(np.random.RandomState(42).permutation(1406)[:351]))
    assert np.array_equal(shares[10], np.sort(shares[25][np.random.RandomState(42).permutation(351)[:140]]))
    assert set(shares[2]) < set(shares[5]) < set(shares[10]) < set(shares[25])
    assert list(subset_cascade(12, [25, 10, 5], 42)) == [25, 10] and len(subset_cascade(12, [25, 10, 5], 42)[10]) == 1
    assert subset_cascade(3, [25], 42) == {}
