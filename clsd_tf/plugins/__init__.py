"""What a user's own modules add: registries of names, and how the modules are loaded.

A plug-in is a module that registers what it brings as it is imported, for example a backbone with
``clsd_tf.backbones.register_backbone``. Every command loads the modules that ``--plugin=<module>`` names, which may lie
in the current directory, and those that installed packages declare::

    [project.entry-points."clsd_tf.plugins"]
    my_backbones = "my_package.backbones"
"""
