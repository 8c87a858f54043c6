"""Bindings: methods and modulations for the models of host libraries. Each subpackage needs its library."""
