# What the stages of experiment.smk, which includes this, take: inputs and parameters of a cell, or a cell and a variant.
# Its names are those of experiment.smk.


def names(choices):
    """A pattern of some names."""
    return "|".join(map(re.escape, choices)) or "none"


def cell_of(wildcards):
    return ALL_CELLS[wildcards.cell]


def variants_of(cell):
    """What names a cell's variants in the name of a file."""
    return hashlib.sha256(" ".join(ALL_CELLS[cell].variants).encode()).hexdigest()[:8]


def there(wildcards, folder):
    """How many images or masks a folder of the cell holds; none before they are there."""
    images = Path(wildcards.cell, folder)
    return sum(1 for path in images.iterdir() if path.suffix in (".png", ".tif")) if images.is_dir() else 0


def data_seen(wildcards):
    """The data folder that the cell's diffusion model sees."""
    return f"{wildcards.cell}/split/{'generator' if cell_of(wildcards).track == 'patches' else 'seen'}"


def steps(wildcards):
    """Of the cell's diffusion model, as its files name them."""
    folder = Path(data_seen(wildcards)).name
    return f"{diffusion_steps(there(wildcards, f'split/{folder}/{TRAIN}')):06d}"


def amount(kind=None, folder=None):
    """
    An input function: how many patches of a kind the cell makes. No fewer than its folder has: where a variant with a
    large ratio has been taken out, the others have enough, and nothing is to be done.
    """

    def count(wildcards):
        wanted = protocol.involved(cell_of(wildcards).variants, VARIANTS)
        sizes = (there(wildcards, f"split/{name}") for name in (f"seen/{TRAIN}", "unlabelled"))
        needed = protocol.amounts(wanted, VARIANTS, *sizes).get(kind or wildcards.kind, 0)
        return max(needed, there(wildcards, folder or f"{kind or wildcards.kind}/samples"))

    return count


def colours(wildcards):
    """What lends samples their colours; on track slides the structures' own folder, unless others lend structures."""
    if cell_of(wildcards).track != "slides":
        return f"--appearance_dir {wildcards.cell}/split/colours"
    return f"--appearance_dir {wildcards.cell}/split/seen/{TRAIN}" if wildcards.kind == "layouts" else ""


def kinds_of(variant):
    """An input function: the seals of what a variant adds."""
    return lambda wildcards: [f"stages/{wildcards.cell}-{kind}.json" for kind in variant(wildcards).kinds]


def added(wildcards):
    """The results folders that a variant adds."""
    variant = VARIANTS[wildcards.variant]
    folders = [f"filters/{variant.choice}/kept"] if variant.choice else variant.kinds
    return [f"{wildcards.cell}/{folder}" for folder in folders]


def seals_of_set(wildcards):
    """An input function: what a variant's set is made of, and the set that is to be as large."""
    variant = VARIANTS[wildcards.variant]
    found = [f"{variant.choice}-filter"] if variant.choice else list(variant.kinds)
    found += [f"{variant.size}-set"] if variant.size else []
    return [f"stages/{wildcards.cell}-{name}.json" for name in found]


def ratio(wildcards):
    """Of a variant's set, as assemble_set.py counts: beside all real patches, held-out ones, too."""
    variant = VARIANTS[wildcards.variant]
    if variant.size:
        record = Path(wildcards.cell, "sets", variant.size, "assemble.json")
        facts = json.loads(record.read_text()) if record.exists() else {"synthetic": 0, "real": 1}
        return repr(facts["synthetic"] / facts["real"])
    if variant.ratio is None:
        return "all"
    return repr(variant.ratio * there(wildcards, f"split/seen/{TRAIN}") / max(1, there(wildcards, f"split/{TRAIN}")))


def data_of(wildcards):
    """The data folder of a variant's segmenter, in the cell, and the stage that makes it."""
    variant = VARIANTS[wildcards.variant]
    return (f"sets/{variant.name}", f"{variant.name}-set") if variant.source else ("split", "split")


def how(wildcards):
    """The flags of a variant's segmenter."""
    variant = VARIANTS[wildcards.variant]
    shares = {"--synthetic_first": variant.first, "--real_last": variant.last}
    order = "".join(f" {flag} {share}" for flag, share in shares.items() if share)
    return f"{FLAGS['SEGMENTER']} {FLAGS['COLOUR' if variant.jitter else 'PLAIN']}{order}"


def flags_of_filter(wildcards):
    """How a choice among samples is made."""
    variant = CHOICES[wildcards.choice]
    flags = f"--backbone {shlex.quote(os.environ['BACKBONE'])} {FLAGS['FILTER']}"
    if variant.filter == "patchcore":
        return f"{flags} {FLAGS['PATCHCORE']}"
    judge = f"{wildcards.cell}/segmenters/{variant.judge}/segmenter.pt"
    return f"{flags} --mode useful --model_path {judge} --useful_bounds {variant.bounds}"


def tests_of(wildcards):
    """An input function: the tests of a cell's variants, but for those whose filter has kept nothing to train on."""
    found = []
    for name in cell_of(wildcards).variants:
        variant = VARIANTS[name]
        choices = [own.choice for own in (variant, VARIANTS.get(variant.size)) if own and own.choice]
        seals = [Path(checkpoints.filter.get(cell=wildcards.cell, choice=own).output[0]) for own in choices]
        if all(any("/kept/samples/" in file for file in json.loads(seal.read_text())["files"]) for seal in seals):
            found.append(f"stages/{wildcards.cell}-{name}-test.json")
    return found
