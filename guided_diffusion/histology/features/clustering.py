"""
Clusters of feature vectors: reduction, clustering, the assignment of new points, scores, and seeded subsets.

Owns the choice of labels. Knows nothing of files or images: arrays in, labels out. All is fitted on the training points
and a function of (points, options, seed); labels are strings, NOISE among them.
"""

import functools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.mixture import GaussianMixture

REDUCERS = ("pca", "umap", "none")
CLUSTERERS = ("kmeans", "hdbscan", "gmm")
NOISE = "-1"
KMEANS_STARTS = 10


@dataclass(frozen=True)
class Options:
    """
    How to cluster.

    :param reduce: one of REDUCERS; n_components: dimensions that are left.
    :param cluster: one of CLUSTERERS; n_clusters: of kmeans and gmm.
    :param min_samples, min_cluster_size: of hdbscan.
    """

    reduce: str = "pca"
    cluster: str = "kmeans"
    n_components: int = 3
    n_clusters: int = 6
    min_samples: int = 10
    min_cluster_size: int = 50

    def __post_init__(self) -> None:
        for name, known in (("reduce", REDUCERS), ("cluster", CLUSTERERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown --{name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        for name, least in (("n_components", 1), ("n_clusters", 2), ("min_samples", 1), ("min_cluster_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}")

    def check_points(self, n: int, dimensions: int) -> None:
        """:raises ValueError: where n training points are too few, or of too few dimensions."""
        needed = {
            "--n_clusters": self.n_clusters if self.cluster != "hdbscan" else 0,
            "--min_cluster_size": self.min_cluster_size if self.cluster == "hdbscan" else 0,
            "--min_samples": self.min_samples + 1 if self.cluster == "hdbscan" else 0,
            "--n_components": self.n_components + 2 if self.reduce != "none" else 0,
        }
        for flag, least in needed.items():
            if n < least:
                value = getattr(self, flag[2:])
                raise ValueError(
                    f"{flag} {value} needs {least} training patches, there are {n}: give less, or more data"
                )
        if self.reduce != "none" and self.n_components > dimensions:
            raise ValueError(f"--n_components {self.n_components} is more than the {dimensions} of the features")

    @property
    def name(self) -> str:
        """The options as the reference writes them in its folders' names; {seed} stands for the seed."""
        reducer = (
            "none" if self.reduce == "none" else f"{self.reduce}_n_components_{self.n_components}_random_state_{{seed}}"
        )
        if self.cluster == "hdbscan":
            return f"{reducer}_hdbscan_min_samples_{self.min_samples}_min_cluster_size_{self.min_cluster_size}"
        return f"{reducer}_{self.cluster}_n_clusters_{self.n_clusters}_random_state_{{seed}}"


@dataclass(frozen=True)
class Clustering:
    """
    What one trial found.

    :param seed: of its random choices.
    :param train, test: [N x d] reduced points; train_labels, test_labels: a label for each.
    :param silhouette: of the training points that are not noise, in the reduced space; None for fewer than 2 clusters.
    """

    seed: int
    train: np.ndarray
    test: np.ndarray
    train_labels: list[str]
    test_labels: list[str]
    silhouette: float | None


def best_of(
    train: np.ndarray,
    test: np.ndarray,
    options: Options,
    seeds: Sequence[int],
    progress: Callable[[], object] = lambda: None,
) -> tuple[Clustering, list[Clustering]]:
    """
    Cluster once for each seed.

    :param train: an [N x D] array of training points; test: an [M x D] array, M may be 0.
    :param progress: called after each trial.
    :return: the trial of the best silhouette, of equal ones the first, and all trials.
    :raises ValueError: where there are too few points, or no trial finds a cluster.
    """
    options.check_points(*train.shape)
    trials = []
    for seed in seeds:
        trials.append(fit(train, test, options, seed))
        progress()
    found = [trial for trial in trials if set(trial.train_labels) - {NOISE}]
    if not found:
        raise ValueError(
            f"--cluster hdbscan finds no cluster among {len(train)} training patches: lower --min_cluster_size "
            f"{options.min_cluster_size} or --min_samples {options.min_samples}"
        )
    return max(found, key=lambda trial: -2.0 if trial.silhouette is None else trial.silhouette), trials


def fit(train: np.ndarray, test: np.ndarray, options: Options, seed: int) -> Clustering:
    """Reduce and cluster by one seed. Parameters as best_of's."""
    near, far = (np.asarray(points, np.float64) for points in _reduced(train, test, options, seed))
    labels, assigned = _clustered(near, far, options, seed)
    return Clustering(seed, near, far, _as_text(labels), _as_text(assigned), silhouette(near, _as_text(labels)))


def silhouette(points: np.ndarray, labels: Sequence[str]) -> float | None:
    """
    Mean silhouette (Rousseeuw 1987), by Euclidean distance and without noise.

    :return: in [-1, 1], or None where fewer than two clusters, or as many as points, are left.
    """
    labels = np.asarray(labels)
    kept = labels != NOISE
    if not 2 <= len(set(labels[kept])) < kept.sum():
        return None
    return float(silhouette_score(points[kept], labels[kept]))


def subset_cascade(n: int, percents: Sequence[int], seed: int) -> dict[int, np.ndarray]:
    """
    Choose ever smaller shares of n items, each out of the one before, as the reference's NNss folders do.

    :param percents: of all items, in falling order.
    :return: per cent -> sorted indices; a share that would be empty, and all after it, are left out.
    """
    kept, before, shares = np.arange(n), 100, {}
    for percent in percents:
        count = len(kept) * percent // before
        if not count:
            break
        kept = np.sort(kept[np.random.RandomState(seed).choice(len(kept), count, replace=False)])
        shares[percent], before = kept, percent
    return shares


def _reduced(train: np.ndarray, test: np.ndarray, options: Options, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if options.reduce == "none":
        return train, test
    if options.reduce == "pca":
        reducer = PCA(options.n_components, random_state=seed)
    else:
        reducer = _umap(options.n_components, seed, len(train))
    near = reducer.fit_transform(train)
    return near, reducer.transform(test) if len(test) else np.zeros((0, options.n_components), near.dtype)


def _umap(n_components: int, seed: int, n: int) -> object:
    # One thread, which a fixed seed needs; more neighbours than there are points are refused.
    neighbours = min(15, n - 1)
    return import_umap()(
        n_components=n_components, n_neighbors=neighbours, random_state=seed, transform_seed=seed, n_jobs=1
    )


def import_umap() -> type:
    """
    :return: the class UMAP.
    :raises ImportError: where its package is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TensorFlow, which only parametric UMAP wants
            try:
                from umap import UMAP
            except RuntimeError as error:
                # Numba refuses to compile where it finds no folder to cache in: a package of another user, and no home.
                if "cannot cache" not in str(error):
                    raise
                import numba

                numba.config.CACHE_DIR = _cache_folder().name
                from umap import UMAP
    except ImportError:
        raise ImportError("--reduce umap needs: pip install umap-learn; or take --reduce pca") from None
    return UMAP


@functools.cache
def _cache_folder() -> tempfile.TemporaryDirectory:
    """A folder of this process alone: a lasting one whose name others can foresee could hold code of theirs."""
    return tempfile.TemporaryDirectory(prefix="numba-")


def _clustered(train: np.ndarray, test: np.ndarray, options: Options, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if options.cluster == "hdbscan":
        return _by_density(train, test, options)
    if options.cluster == "kmeans":
        model = KMeans(options.n_clusters, n_init=KMEANS_STARTS, random_state=seed)
    else:
        model = GaussianMixture(options.n_clusters, random_state=seed)
    labels = model.fit_predict(train)
    return labels, model.predict(test) if len(test) else np.zeros(0, labels.dtype)


def _by_density(train: np.ndarray, test: np.ndarray, options: Options) -> tuple[np.ndarray, np.ndarray]:
    try:
        import hdbscan
    except ImportError:
        raise ImportError("--cluster hdbscan needs: pip install hdbscan; or take --cluster kmeans") from None
    model = hdbscan.HDBSCAN(options.min_cluster_size, options.min_samples, prediction_data=True, core_dist_n_jobs=1)
    labels = model.fit_predict(train)
    if not len(test) or not (labels >= 0).any():
        return labels, np.full(len(test), -1)  # the package would refuse no points, and warn of no clusters
    return labels, hdbscan.approximate_predict(model, test)[0]


def _as_text(labels: np.ndarray) -> list[str]:
    return [str(int(label)) for label in labels]
