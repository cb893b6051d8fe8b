"""Temperatures of a model's heads as data: profiles, their files, and rules that read the query."""
