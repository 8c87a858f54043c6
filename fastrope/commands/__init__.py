"""Subcommands that run whole models: they parse their own arguments and import hosts and bindings when they run."""
