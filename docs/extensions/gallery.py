"""`{gallery}`: each executed notebook by its first picture and its title, as a link to it."""

from collections.abc import Iterator
from itertools import islice

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective


class Gallery(nodes.container):
    """Stands in the page until every notebook has been read."""


class GalleryDirective(SphinxDirective):
    """Puts the gallery where it is written; takes nothing."""

    def run(self) -> list[nodes.Node]:
        """Called by docutils."""
        return [Gallery(classes=["gallery"])]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_node(Gallery)
    app.add_directive("gallery", GalleryDirective)
    app.connect("doctree-resolved", _fill)
    return {"parallel_read_safe": True}


def notebooks(env: BuildEnvironment) -> list[str]:
    """Names of the documents that are notebooks, in order."""
    return sorted(name for name in env.found_docs if env.doc2path(name).suffix == ".ipynb")


def _fill(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for gallery in list(doctree.findall(Gallery)):
        entries = [_entry(app, notebook, docname) for notebook in notebooks(app.env)]
        gallery.replace_self(nodes.container("", *entries, classes=gallery["classes"]))


def _entry(app: Sphinx, notebook: str, docname: str) -> nodes.figure:
    """A figure that leads to the notebook."""
    title = app.env.titles[notebook].astext()
    place = app.builder.get_relative_uri(docname, notebook)
    pictures = [picture.deepcopy() for picture in islice(_outputs(app.env, notebook), 1)]
    for picture in pictures:
        picture["alt"] = title
        picture.attributes.pop("width", None)
    linked = nodes.reference("", "", *pictures, internal=True, refuri=place)
    caption = nodes.caption("", "", nodes.reference("", title, internal=True, refuri=place))
    return nodes.figure("", linked, caption, ids=[nodes.make_id(notebook)])


def _outputs(env: BuildEnvironment, notebook: str) -> Iterator[nodes.image]:
    """Pictures that cells made, which a badge in the text is not."""
    for container in env.get_doctree(notebook).findall(nodes.container):
        if "cell_output" in container["classes"]:
            yield from container.findall(nodes.image)
