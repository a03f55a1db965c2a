"""The embedded model's world, parts and recipe: how `weights/tiny/` was made, and how to make it again."""
