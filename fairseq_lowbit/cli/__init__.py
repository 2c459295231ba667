"""The ``fairseq-lowbit`` command: one module per subcommand, see ``main``."""
