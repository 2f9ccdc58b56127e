"""How to cite the project and the paper of its models; CITATION.cff says the same."""

BIBTEX = """\
@software{cartmoe,
  title = {cartmoe: how much does a Mixture-of-Experts model depend on its router being right?},
  author = {{The cartmoe contributors}},
  version = {0.1.0},
  license = {Apache-2.0}
}

@inproceedings{su2025cartesianmoe,
  title = {{CartesianMoE}: Boosting Knowledge Sharing among Experts via Cartesian Product Routing
           in Mixture-of-Experts},
  author = {Su, Zhenpeng and Wu, Xing and Lin, Zijia and Xiong, Yizhe and Lv, Minxuan and
            Ma, Guangyuan and Chen, Hui and Hu, Songlin and Ding, Guiguang},
  booktitle = {Proceedings of NAACL 2025},
  year = {2025},
  eprint = {2410.16077},
  archivePrefix = {arXiv}
}
"""
