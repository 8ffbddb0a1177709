"""The embedded world: real handwritten digits in colour on textured grounds, and four small networks.

It lets the whole pipeline run on a laptop without a download. ``python -m vapi.digits`` rebuilds
``data/`` from the digits that scikit-learn carries (UCI, 1,797 glyphs of 8 x 8).
"""
