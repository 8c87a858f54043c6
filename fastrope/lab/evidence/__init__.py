"""What the methods do on the models of the lab: measured, stored, and reported from the stored numbers.

Each method has a module of its own with ``measure``, ``text`` and ``draw``. ``measure`` runs pipelines through the
public interface and returns :class:`fastrope.lab.evidence.findings.Findings`, numbers per sample. The page and its
pictures are made of these and of nothing else, by :mod:`fastrope.lab.evidence.page`.
"""
