"""Writes the page."""


def write_page(results, path):
    del results, path
