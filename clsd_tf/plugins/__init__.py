"""Plug-ins: registries of names, and the loading of a user's own modules that add to them.

A plug-in is a module that registers what it brings as it is imported, for example a backbone with
``clsd_tf.backbones.register_backbone``. Every command loads the modules that ``--plugin=<module>`` names, which may lie
in the current directory, and those that installed packages declare::

    [project.entry-points."clsd_tf.plugins"]
    my_backbones = "my_package.backbones"
"""
