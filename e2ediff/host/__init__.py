"""Turn names into parts: hooks, plugins, registries, and recipes read into values.

Read in this order: `hookspecs` (what a plugin may define), `plugins` (`load` gives a `Host`),
`registry` (names to classes), `recipe` (what a recipe holds; `load_recipe`), `structure` (typed
values from a YAML tree), `yaml` (the tree, with the place of every value).
"""
