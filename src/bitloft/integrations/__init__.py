"""The only files that know transformers and PEFT, and the one call that makes them know us."""


def register() -> None:
    """Make transformers and PEFT know bitloft: from then on ``AutoModel*.from_pretrained`` reads our checkpoints.

    ``bitloft.load`` and the CLI call it themselves; calling it again does nothing.
    """
    from bitloft.integrations import peft, transformers

    transformers.register()
    peft.register()
