"""`kdkit kaggle`: from a checkout to notebooks on Kaggle."""

from pathlib import Path

import click


@click.group()
@click.option(
    "--checkout", type=click.Path(path_type=Path), help="Of kdkit.  [default: the one kdkit is imported from]"
)
@click.pass_context
def kaggle(context: click.Context, checkout: Path | None) -> None:
    """Put the notebooks of a checkout on Kaggle; kaggle/README.md tells the whole way."""
    context.obj = checkout


@kaggle.command()
@click.option("--owner", required=True, metavar="NAME", help="Kaggle account; written to files git ignores.")
@click.option("--resume", multiple=True, metavar="SLUG", help="Attach the output of its latest version; repeatable.")
@click.pass_obj
def render(checkout: Path | None, owner: str, resume: tuple[str, ...]) -> None:
    """Write kernel-metadata.json for every notebook and dataset-metadata.json, all from kaggle/kernels.yaml."""
    from kdkit.kaggle import kernels, table

    root = table.checkout_folder(checkout)
    for path in kernels.render(root, table.read_table(root), owner=owner, resumed=frozenset(resume)):
        click.echo(path)


@kaggle.command()
@click.argument("slugs", nargs=-1, required=True, metavar="SLUG...")
@click.pass_obj
def push(checkout: Path | None, slugs: tuple[str, ...]) -> None:
    """Push the kernels of these slugs; Kaggle runs each at once, and the GPU hours count."""
    from kdkit.kaggle import kernels, table
    from kdkit.kaggle.push import push_kernel

    root = table.checkout_folder(checkout)
    known = table.read_table(root)
    chosen = [known.kernel(slug) for slug in slugs]
    kernels.check_notebooks(root, chosen)
    for kernel in chosen:
        kernels.check_rendered(root, known, kernel)
    for kernel in chosen:
        pushed = push_kernel(kernels.kernel_folder(root, known, kernel))
        click.echo(f"{kernel.slug}: version {pushed.version} runs at {pushed.url}")


@kaggle.command()
@click.option("--output", type=click.Path(path_type=Path), help="Folder to fill.  [default: kaggle/dataset]")
@click.pass_obj
def wheels(checkout: Path | None, output: Path | None) -> None:
    """Build kdkit's wheel and collect what the Kaggle image lacks: Python 3.12, for sessions without internet."""
    from kdkit.kaggle import kernels, table
    from kdkit.kaggle.wheelhouse import build_wheelhouse

    root = table.checkout_folder(checkout)
    listed = table.read_table(root)
    click.echo("building kdkit's wheel and fetching the others: about half a minute", err=True)
    for path in build_wheelhouse(root, listed, output or root / kernels.DATASET_FOLDER):
        click.echo(path)
